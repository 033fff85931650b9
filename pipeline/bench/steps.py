"""What a training step costs as sparsity rises: `python -m nuteprune.bench.steps` (part of `make bench`).

The sparsities are measured in turns, round by round, so that a machine whose speed drifts biases none of them; the
ratios are medians over rounds of a round's time over the same round's time at 0%.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nuteprune.config import TeacherConfig, load_config
from nuteprune.evaluation.measure import environment
from nuteprune.masks import Gates, select_units, unit_shape
from nuteprune.model.layers import View, build_view
from nuteprune.model.loading import load_model, read_base
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.distributed import World, discover
from nuteprune.runs.log import quiet_libraries
from nuteprune.training.teachers.bank import SnapshotBank

LAG = 0.10
"""How far the teacher is behind the student in the measured step: ten intervals of 1%, as in the paper."""


@dataclass
class Subject:
    """One sparsity under test: the student's gates, its teacher 10 points denser, and a teacher as sparse as it."""

    sparsity: float
    gates: Gates
    teacher: View
    same: View


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/steps.json"))
    args = parser.parse_args(argv)
    quiet_libraries()
    world = discover()
    config = load_config(None, [f"model.path={args.model}", f"model.dtype={args.dtype}"])
    base = read_base(config.model)
    spec, model = base.spec, PairedModel(load_model(base, world.device), base.spec, config.lora)
    subjects = [subject(model, s, world) for s in args.sparsities]
    ids = torch.randint(0, spec.vocab, (args.batch, args.tokens), device=world.device)
    rows = measure(model, subjects, ids, config.loss, args.rounds)
    switch = switching(model, subjects, config.teacher, world)
    result = {
        "model": args.model, "dtype": args.dtype, "batch": args.batch, "tokens": args.tokens, "rounds": args.rounds,
        "environment": environment(world.device), "rows": rows, "switch_s": switch,
    }  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    share = switch / rows[-1]["step_s"]
    sys.stdout.write(
        table(rows) + f"\nto switch the teacher: {1000 * switch:.1f} ms, {share:.2%} of the last row's step\n"
    )
    sys.stdout.write(f"{args.json}\n")
    return 0


def subject(model: PairedModel, sparsity: float, world: World) -> Subject:
    """Random structures (the cost depends on the counts only) at a sparsity and at its teacher's."""
    lora = model.update.pairs()

    def gates(s: float) -> Gates:
        generator = torch.Generator().manual_seed(0)
        scores = {k: torch.rand(unit_shape(model.spec, k), generator=generator) for k in ("kv_groups", "ffn")}
        return select_units(model.spec, scores, s, "per_layer").to(world.device)

    def view(s: float) -> View:
        return build_view(model.spec, gates(s), lora, model.scaling, model.dtype)

    return Subject(sparsity, gates(sparsity), view(max(0.0, sparsity - LAG)), view(sparsity))


def measure(model: PairedModel, subjects: list[Subject], ids, loss, rounds: int) -> list[dict]:
    """Seconds of a step, of a teacher pass with the head and of its layers alone, in turns; one warm-up round."""
    times: dict[float, dict[str, list[float]]] = {
        s.sparsity: {"step": [], "teacher": [], "layers": []} for s in subjects
    }
    for number in range(rounds + 1):
        for s in subjects:
            measured = {"step": _timed(lambda s=s: _step(model, s, ids, loss)), **_teacher(model, s, ids)}
            if number:
                for key, value in measured.items():
                    times[s.sparsity][key].append(value)
    base = times[subjects[0].sparsity]
    rows = []
    for s in subjects:
        row = {"sparsity": s.sparsity}
        for key, values in times[s.sparsity].items():
            row[f"{key}_s"] = statistics.median(values)
            row[f"{key}_ratio"] = statistics.median(a / b for a, b in zip(values, base[key], strict=True))
        rows.append(row)
    return rows


def switching(model: PairedModel, subjects: list[Subject], config: TeacherConfig, world: World) -> float:
    """Median seconds to put another snapshot in force, two of the bank in turns."""
    bank = SnapshotBank(model.spec, config, model.scaling, world.device, model.dtype)
    for number, subject in enumerate(subjects[-2:], 1):
        bank.record(0, number * config.interval, subject.gates, {}, model.update.lora, model.update.frozen)
    return statistics.median(_timed(lambda index=n % 2: bank.activate(index)) for n in range(20))


def _step(model: PairedModel, s: Subject, ids, loss) -> None:
    view = model.student(s.gates)
    model(ids, view, s.teacher, loss).total.backward()
    for parameter in (t for pair in model.lora().values() for t in pair):
        parameter.grad = None


@torch.no_grad()
def _teacher(model: PairedModel, s: Subject, ids) -> dict[str, float]:
    return {"teacher": _timed(lambda: model.logits(ids, s.same)), "layers": _timed(lambda: model.hidden(ids, s.same))}


def _timed(work) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def table(rows: list[dict]) -> str:
    """The rows as plain text; ratios are to the first row."""
    head = ("sparsity", "step s", "ratio", "teacher s", "ratio", "its layers s", "ratio")
    lines = ["{:>8}  {:>7} {:>6}  {:>9} {:>6}  {:>12} {:>6}".format(*head)]
    lines += [
        f"{r['sparsity']:>8.0%}  {r['step_s']:>7.2f} {r['step_ratio']:>6.2f}  {r['teacher_s']:>9.2f} "
        f"{r['teacher_ratio']:>6.2f}  {r['layers_s']:>12.2f} {r['layers_ratio']:>6.2f}"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
