"""Perplexity of pruned models at a small token budget: `make bench-quality`.

Prunes one model with our recipe, with one intact teacher, with none, and with the baseline a user would build in an
afternoon, at each sparsity, from the same data, seed and LoRA budget; exports each and scores the exported model on
held-out text. `--finetune records.json` adds each student after fine-tuning, `--ladder 0.1 0.2` the rungs below each of
our runs. A run that is already finished is not pruned again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nuteprune.__main__ import quiet_libraries
from nuteprune.config import Config, ConfigError, load_config
from nuteprune.data.text import text_tokens
from nuteprune.evaluation.measure import environment, perplexity
from nuteprune.exporting.card import RECORD
from nuteprune.model.loading import load_any
from nuteprune.parallel.distributed import discover
from nuteprune.stages import export, finetune, prune

VARIANTS = {
    "ours": [],
    "intact-teacher": ["teacher.mode=intact"],
    "no-teacher": ["teacher.mode=none"],
    "taylor": ["recipe=taylor"],
}
"""Overrides of each row. `taylor` is the baseline: scores taken once, one ranking, a hard schedule (its recipe)."""


def main(argv: list[str] | None = None) -> int:
    """Prune, export, score and print; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--train", type=Path, required=True, help="training text, e.g. 300 documents of C4 as JSONL")
    parser.add_argument("--test", type=Path, required=True, help="held-out text, e.g. the raw test set of WikiText-2")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--blocks", type=int, default=20, help="blocks of 1,024 tokens that are scored")
    parser.add_argument("--finetune", type=Path, help="instruction records to fine-tune each student on")
    parser.add_argument("--ladder", type=float, nargs="+", default=[], help="rungs of our runs that are scored too")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/quality"))
    parser.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="a setting of every run")
    args = parser.parse_args(argv)
    quiet_libraries()
    try:
        return bench(args)
    except ConfigError as error:
        sys.stderr.write(f"bench-quality: {error}\n")
        return 2


def bench(args: argparse.Namespace) -> int:
    """Fill the table row by row; what is measured is on disk after each row."""
    for path in (args.train, args.test, args.finetune):
        if path and not path.is_file():
            raise ConfigError(f"{path} does not exist: give a text file (make bench-quality TRAIN=… TEST=…)")
    rows = [{"variant": "intact", "sparsity": 0.0, "perplexity": score(args, args.model)}]
    for sparsity in args.sparsities:
        for variant in args.variants:
            for row in measure(args, variant, sparsity):
                rows.append(row)
                save(args, rows)
                sys.stderr.write(table(rows) + "\n")
    sys.stdout.write(table(rows) + "\n")
    return 0


def measure(args: argparse.Namespace, variant: str, sparsity: float) -> Iterator[dict]:
    """The rows of one run: the pruned student, the rungs below it, and each of them fine-tuned."""
    config = run_config(args, variant, sparsity)
    began = time.perf_counter()
    prune.run(config)
    rungs = [rung for rung in args.ladder if rung < sparsity] if variant == "ours" else []
    for rung in (0.0, *rungs):
        name = f"{variant}, rung" if rung else variant
        for tuned in (False, True) if args.finetune else (False,):
            if tuned:
                finetune.run(load_config(config, [f"finetune.sparsity={rung}"]))
            source = "finetuned" if tuned else "pruned"
            exported = export.run(load_config(config, [f"export.sparsity={rung}", f"export.source={source}"]))
            record = json.loads((exported / RECORD).read_text(encoding="utf-8"))
            yield {
                "variant": f"{name}, tuned" if tuned else name, "sparsity": rung or sparsity,
                "reached": record["sparsity"], "perplexity": score(args, str(exported)),
                "seconds": round(time.perf_counter() - began),
            }  # fmt: skip
            began = time.perf_counter()


def run_config(args: argparse.Namespace, variant: str, sparsity: float) -> Config:
    """The configuration of one row."""
    return load_config(None, [
        *VARIANTS[variant], f"run_dir={args.out}/{variant}-{sparsity:g}-{args.steps}", f"model.path={args.model}",
        f"data.source={args.train}", "data.documents=0", "data.seq_len=256", "train.batch_size=4",
        f"train.steps={args.steps}", f"sparsity.target={sparsity}", "gates.shape=per_layer", "seed=0",
        f"finetune.data={args.finetune or ''}", *args.set,
    ])  # fmt: skip


def score(args: argparse.Namespace, path: str) -> float:
    """Perplexity of a model directory on the first blocks of 1,024 tokens of the test text."""
    config = load_config(None, [f"model.path={path}"])
    model, tokenizer, _ = load_any(path, config.model)
    tokens = text_tokens(args.test, config.data.text_field, tokenizer)
    return perplexity(model.to(discover().device), tokens, 1024, 0, args.blocks)["perplexity"]


def save(args: argparse.Namespace, rows: list[dict]) -> None:
    """Write the rows so far and what they were measured on."""
    result = {"model": args.model, "train": args.train.name, "test": args.test.name, "steps": args.steps,
              "blocks": args.blocks, "environment": environment(discover().device), "rows": rows}  # fmt: skip
    (args.out / f"quality-{args.steps}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict]) -> str:
    """One line a row: variant, target, reached sparsity, perplexity, its ratio to the baseline's at that sparsity."""
    baseline = {r["sparsity"]: r["perplexity"] for r in rows if r["variant"] == "taylor"}
    lines = [f"{'variant':<20} {'target':>6} {'reached':>8} {'perplexity':>10} {'/ baseline':>10} {'seconds':>8}"]
    for r in rows:
        ratio = r["perplexity"] / baseline[r["sparsity"]] if r["sparsity"] in baseline else float("nan")
        lines.append(
            f"{r['variant']:<20} {r['sparsity']:>6.0%} {r.get('reached', 0.0):>8.2%} {r['perplexity']:>10.2f} "
            f"{ratio:>10.3f} {r.get('seconds', 0):>8}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
