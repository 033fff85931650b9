"""Everything that only a GPU can tell, in one go, as one Markdown report: `make gpu-check`.

The parts and their budgets stand in gpu_parts.py; on one card they take less than nine minutes together. The result of
each part is kept, so that a check that is cut short goes on where it stopped: start it again. A part that is named is
checked anew: `--parts kernel-times,planned`. Without a card what can be run is run on the CPU in a small form, and the
report says what was skipped. A GPU that the machine has and torch does not see is a bar that is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import traceback
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu_parts import PARTS
from benchmarks.gpu_place import MET, MISSED, SKIPPED, Line, Place
from benchmarks.kernels import machine
from nuteprune.evaluation.measure import environment


def check(name: str, place: Place) -> dict:
    """The result of a part: its lines and how long it took, kept beside its logs."""
    budget, part = PARTS[name]
    shutil.rmtree(place.out, ignore_errors=True)
    place.out.mkdir(parents=True)
    began, lines = time.monotonic(), list[Line]()
    place.until = began + budget if place.cuda else place.until
    try:
        lines += part(place)
    except Exception as error:  # whatever it is: the other parts go on
        (place.out / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
        lines.append(Line(name, "runs", f"{type(error).__name__}: see {place.out / 'error.log'}", MISSED))
    shutil.rmtree(place.models, ignore_errors=True)  # 14 GB of one
    return {
        "where": where(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": round(time.monotonic() - began),
        "lines": [asdict(line) for line in lines],
    }


def where() -> str:
    """What a result is worth nothing without: the card and torch's version."""
    return f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}"


def kept(file: Path) -> dict | None:
    """A result of this card that was kept, or None."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        return result if result["where"] == where() and [Line(**line) for line in result["lines"]] else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def markdown(facts: dict, results: dict[str, dict]) -> str:
    """The report."""
    lines = [Line(**line) for result in results.values() for line in result["lines"]]
    counts = {verdict: sum(line.verdict == verdict for line in lines) for verdict in (MET, MISSED, SKIPPED)}
    missing = [name for name in PARTS if name not in results]
    parts = ["# GPU check", f"{counts[MET]} met, {counts[MISSED]} missed, {counts[SKIPPED]} skipped."]
    if missing:
        parts.append(f"Not checked yet: {', '.join(missing)}.")
    parts.append("\n".join(f"- {key}: {value}" for key, value in facts.items() if value is not None))
    table = ["| check | bar | found | |", "|---|---|---|---|"]
    table += [f"| {line.what} | {line.bar} | {line.found} | {line.verdict} |" for line in lines]
    times = ["| part | seconds | budget on a card | checked |", "|---|---:|---:|---|"]
    times += [f"| {n} | {r['seconds']} | {PARTS[n][0]} | {r['date']} |" for n, r in results.items()]
    return "\n\n".join([*parts, "\n".join(table), "\n".join(times)]) + "\n"


def names(text: str) -> list[str]:
    """Names of parts, from a list with commas."""
    found = text.split(",")
    if unknown := [name for name in found if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(PARTS)}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Check and write the report; the exit code is 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=names, help=f"check these anew, and no others: {','.join(PARTS)}")
    parser.add_argument("--model", default="models/smollm2-135m", help="whose tokenizer the short runs use")
    parser.add_argument("--text", default="models/demo-text/train.txt")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    facts = environment(torch.device("cuda" if cuda else "cpu")) | {
        "driver": machine("cuda" if cuda else "cpu")["driver"] if cuda else "no card here: what follows ran on the CPU",
        "cards": torch.cuda.device_count(),
        "flash-attn": "installed" if find_spec("flash_attn") else "not installed",
    }
    results, report = {}, args.out / "report.md"
    for name in PARTS:
        file, place = args.out / f"{name}.json", Place(args.out / name, args.model, args.text)
        found = kept(file)
        if name in args.parts if args.parts else found is None:
            sys.stderr.write(f"{name} …\n")
            found = check(name, place)
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if found:
            results[name] = found
            report.write_text(markdown(facts, results), encoding="utf-8")
    sys.stdout.write(f"{report.read_text(encoding='utf-8')}\nkept in {args.out}: remove it to check all anew\n")
    return int(any(line["verdict"] == MISSED for result in results.values() for line in result["lines"]))


if __name__ == "__main__":
    sys.exit(main())
