"""Quality of pruned models at a small token budget, fairly compared: `make bench-quality`.

Prunes each model with our recipe, with one intact teacher, with none, without `lora.refit`, with a ranking taken once
(`recipe: taylor`), and by the paper's recipe, at each sparsity and for each seed, in the shape that is exported by
default, from the same data. All rows but the paper's have the same optimizer, schedule of the learning rate and LoRA.
Each exported model is scored on every text: perplexity; ΔNLL, the nats per token that it lost against the intact model,
which compares models of different tokenizers; and the KL divergence per token of its predictions from the intact
model's.

The row `distilled` is pruned in as many of its steps as `nuteprune run` takes for that; in the others its export is
distilled.
The row `control` is the intact model with the same LoRA trained by cross entropy on the same text: what the text's
domain alone is worth. Documents held out of the training file are a text of its own kind.

`--finetune records.json` adds each student after fine-tuning, `--ladder 0.1 0.2` the rungs below each of our runs, and
`--recover` each rung after its recovery.
Several `--steps` draw what each row makes of a budget. The same command goes on after an interruption, and takes more
models, seeds, steps, sparsities or variants into the table it has. Several such commands, of different rows, may fill
one table at a time.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure
from torch import LongTensor, Tensor
from transformers import PreTrainedModel

from nuteprune.config import Config, load_config
from nuteprune.data.sequences import first_tokens
from nuteprune.data.text import text_tokens
from nuteprune.errors import UserError
from nuteprune.evaluation.measure import compare, environment, last_states
from nuteprune.evaluation.models import load_any
from nuteprune.exporting.card import RECORD
from nuteprune.exporting.small import export_model
from nuteprune.parallel.distributed import discover
from nuteprune.planning.machine import pruning_steps
from nuteprune.runs.checkpoint import write_atomic
from nuteprune.runs.log import quiet_libraries
from nuteprune.stages import distill, finetune, prune, recover

WINDOW = 1024
NOTHING = 1e-6
"""A target sparsity at which no unit leaves: LoRA is all that changes."""
VARIANTS = {
    "ours": [],
    "distilled": [],
    "intact-teacher": ["teacher.mode=intact"],
    "no-teacher": ["teacher.mode=none"],
    "no-refit": ["lora.refit=0"],
    "taylor": ["recipe=taylor"],
    "paper": ["recipe=paper", "gates.units=[heads,kv_groups,ffn]"],
    "control": ["teacher.mode=none", "lora.refit=0", "gates.importance_tokens=1", f"sparsity.target={NOTHING}"],
}
"""Overrides of each row. `taylor`: scores taken once, one ranking, a hard schedule (its recipe), the rest as ours."""


def main(argv: list[str] | None = None) -> int:
    """Prune, export, score and print; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["models/smollm2-135m"], help="directories of intact models")
    parser.add_argument("--train", type=Path, required=True, help="training text: documents of C4 as JSONL, say")
    parser.add_argument("--held-out", type=int, default=0, help="last documents of it that are scored, not trained on")
    parser.add_argument(
        "--test", type=Path, nargs="+", required=True, help="texts to score, e.g. WikiText-2's test set"
    )
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, nargs="+", default=[120])
    parser.add_argument("--seeds", type=int, default=1, help="runs of each row, seeded 0, 1, …")
    parser.add_argument("--blocks", type=int, default=20, help=f"blocks of {WINDOW:,} tokens that are scored")
    parser.add_argument("--finetune", type=Path, help="instruction records to fine-tune each student on")
    parser.add_argument("--ladder", type=float, nargs="+", default=[], help="rungs of our runs that are scored too")
    parser.add_argument("--recover", action="store_true", help="add each rung after its recovery")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/quality"))
    parser.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="a setting of every run")
    args = parser.parse_args(argv)
    quiet_libraries()
    try:
        return bench(args)
    except UserError as error:
        sys.stderr.write(f"bench-quality: {error}\n")
        return 2


def bench(args: argparse.Namespace) -> int:
    """Fill the table row by row; what is measured is on disk after each run, and not measured again."""
    for path in (args.train, *args.test, args.finetune):
        if path and not path.is_file():
            raise UserError(f"{path} does not exist: give a text file (make bench-quality TRAIN=… TEST=…)")
    args.out.mkdir(parents=True, exist_ok=True)
    args.source = args.train.name
    args.train, held_out = split(args.train, args.held_out, args.out)
    args.test = [*args.test, *held_out]
    for model in args.model:
        fill(args, model)
    runs = known(args)
    if len(args.steps) > 1:
        (args.out / "budget.png").write_bytes(picture(runs))
    sys.stdout.write(table(runs) + "\n")
    return 0


def fill(args: argparse.Namespace, model: str) -> None:
    """The rows of one model that the table has not yet."""
    scorer, intact = None, {}
    for steps, sparsity, variant, seed in product(args.steps, args.sparsities, args.variants, range(args.seeds)):
        if variant == "control" and sparsity != args.sparsities[0]:
            continue  # removes nothing: one row for all of them
        row = {"model": Path(model).name, "run": f"{variant}-{sparsity:g}-{steps}", "seed": seed}
        if any(row.items() <= run.items() for run in known(args)):
            continue
        if scorer is None:
            scorer = Scorer(model, args.test, args.blocks)
            if not has_intact(known(args), Path(model).name):
                intact = {**row, "run": "intact", "variant": "intact", "sparsity": 0.0, "steps": 0, "seed": 0,
                          **scorer.score(model)}  # fmt: skip
        found = [row | run for run in measure(args, scorer, model, variant, sparsity, steps, seed)]
        runs = known(args)  # others may have filled in theirs meanwhile
        if intact and not has_intact(runs, Path(model).name):
            runs.append(intact)
        save(args, runs + found)
        sys.stderr.write(table(runs + found) + "\n")


def has_intact(runs: list[dict], model: str) -> bool:
    """Whether a table has a model's own row."""
    return any(run["variant"] == "intact" and run["model"] == model for run in runs)


def split(train: Path, held_out: int, out: Path) -> tuple[Path, list[Path]]:
    """The training file and, where documents are held out, what is left of it and a file of those."""
    if not held_out:
        return train, []
    with train.open(encoding="utf-8", newline="\n") as file:
        lines = file.readlines()  # not splitlines: a record may hold other ends of lines, U+2028 say
    if train.suffix != ".jsonl" or held_out >= len(lines):
        raise UserError(f"--held-out {held_out}: {train} must be a .jsonl file of more documents than that")
    parts = {"train.jsonl": lines[:-held_out], "held-out.jsonl": lines[-held_out:]}
    for name, part in parts.items():
        (out / name).write_text("".join(part), encoding="utf-8")
    return out / "train.jsonl", [out / "held-out.jsonl"]


class Scorer:
    """Scores model directories on texts, beside the intact model.

    Args:
        intact: directory of the intact model, which is kept in memory.
        texts: files to score.
        blocks: of `WINDOW` tokens from the start of each text.
    """

    def __init__(self, intact: str, texts: list[Path], blocks: int):
        self.blocks = blocks
        self.intact, tokenizer = self.load(intact)
        self.path, self.first = intact, first_tokens(tokenizer)
        self.texts: dict[str, LongTensor] = {text.stem: text_tokens(text, "text", tokenizer) for text in texts}
        self.wanted = {name: self.states(self.intact, name) for name in self.texts}

    def load(self, path: str) -> tuple[PreTrainedModel, object]:
        """A model on the device, in float32, and its tokenizer."""
        model, tokenizer, _ = load_any(path, load_config(None, [f"model.path={path}"]).model)
        return model.to(discover().device), tokenizer

    def states(self, model: PreTrainedModel, text: str) -> Tensor:
        """Last hidden states [blocks, T, D] of a text's first blocks."""
        return last_states(model, self.texts[text], WINDOW, self.blocks, self.first)

    def score(self, model: PreTrainedModel | str) -> dict:
        """`perplexity` and `kl` (nats per token, from the intact model) by text, of a model or the directory of one."""
        if isinstance(model, str):
            model = self.intact if model == self.path else self.load(model)[0]
        result: dict[str, dict[str, float]] = {"perplexity": {}, "kl": {}}
        for name, tokens in self.texts.items():
            wanted = self.wanted[name]
            own = wanted if model is self.intact else self.states(model, name)
            found = compare(self.intact, wanted, model, own, tokens, self.first)
            result["perplexity"][name], result["kl"][name] = found
        return result


def measure(args, scorer: Scorer, model: str, variant: str, sparsity: float, steps: int, seed: int) -> Iterator[dict]:
    """What one run gives: the pruned student and the rungs below it, and each of them recovered and fine-tuned."""
    config = run_config(args, model, variant, sparsity, steps, seed)
    began = time.perf_counter()
    prune.run(config)
    rungs = [rung for rung in args.ladder if rung < sparsity] if variant == "ours" else []
    for rung in (0.0, *rungs):
        name = f"{variant}, rung" if rung else variant
        tuned = args.finetune and variant != "distilled"
        forms = ["", *(["recovered"] if rung and args.recover else []), *(["tuned"] if tuned else [])]
        for form in forms:
            if form == "recovered":
                recover.run(load_config(config, [f"recover.ladder=[{rung}]"]))
            elif form == "tuned":
                finetune.run(load_config(config, [f"finetune.sparsity={rung}"]))
            source = "newest" if form else "pruned"
            exported = export_model(load_config(config, [f"export.sparsity={rung}", f"export.source={source}"]))
            if variant == "distilled":
                exported = distill.run(config)
            record = json.loads((exported / RECORD).read_text(encoding="utf-8"))
            yield {
                "variant": f"{name}, {form}" if form else name, "sparsity": rung or config.sparsity.target,
                "steps": steps, "seed": seed, "reached": record["sparsity"], "shape": config.gates.shape,
                **scorer.score(str(exported)), "seconds": round(time.perf_counter() - began),
            }  # fmt: skip
            began = time.perf_counter()


def run_config(
    args: argparse.Namespace, model: str, variant: str, sparsity: float, steps: int, seed: int
) -> Config:  # fmt: skip
    """The configuration of one run."""
    first = pruning_steps(steps) if variant == "distilled" else steps
    return load_config(None, [
        f"run_dir={args.out}/{Path(model).name}/{variant}-{sparsity:g}-{steps}-{seed}", f"model.path={model}",
        f"data.source={args.train}", "data.documents=0", "data.seq_len=256", "train.batch_size=4",
        f"train.steps={first}", f"distill.steps={steps - first}", f"sparsity.target={sparsity}", f"seed={seed}",
        f"finetune.data={args.finetune or ''}", *args.set, *VARIANTS[variant],
    ])  # fmt: skip


def conditions(args: argparse.Namespace) -> dict:
    """What all runs of a table share."""
    return {"train": args.source, "held_out": args.held_out,
            "test": [path.name for path in args.test], "blocks": args.blocks, "ladder": args.ladder,
            "recover": args.recover, "finetune": str(args.finetune or ""), "settings": args.set}  # fmt: skip


def save(args: argparse.Namespace, runs: list[dict]) -> None:
    """Write the runs so far and what they were measured on."""
    result = {**conditions(args), "environment": environment(discover().device), "runs": runs}
    write_atomic(args.out / "quality.json", (json.dumps(result, indent=1) + "\n").encode())


def known(args: argparse.Namespace) -> list[dict]:
    """The runs that `--out` holds already; raises `UserError` if they were made under other conditions."""
    file = args.out / "quality.json"
    if not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, value in conditions(args).items() if found.get(name) != value]
    if other:
        raise UserError(f"{file} was measured with another {', '.join(other)}: give another --out, or remove it")
    return found["runs"]


def rows(runs: list[dict]) -> dict[tuple, list[dict]]:
    """The runs of each row, which have model, steps, sparsity and variant in common."""
    found: dict[tuple, list[dict]] = {}
    for run in runs:
        found.setdefault((run["model"], run["steps"], run["sparsity"], run["variant"]), []).append(run)
    return found


def mean(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds; the error of one seed is not known."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def verdict(own: dict[int, float], ours: dict[int, float]) -> str:
    """Ours over a row, by the perplexity of each seed: a ratio, or `equal` if it is within two standard errors of 1.

    Runs of one seed are compared with each other: they read the same text in the same order, which moves both alike.
    """
    pairs = [math.log(ours[seed] / own[seed]) for seed in own.keys() & ours.keys()]
    if not pairs:
        return ""
    ratio, error = mean(pairs)
    if math.isnan(error):
        return f"{math.exp(ratio):.3f}, one seed"
    return "equal" if abs(ratio) < 2 * error else f"{math.exp(ratio):.3f}"


def lost(runs: list[dict], group: list[dict], text: str) -> list[float]:
    """ΔNLL of each run of a row on a text: the nats per token that it lost against its intact model."""
    (intact,) = (run for run in runs if run["model"] == group[0]["model"] and run["variant"] == "intact")
    return [math.log(run["perplexity"][text] / intact["perplexity"][text]) for run in group]


def table(runs: list[dict]) -> str:
    """A line a row: mean ± standard error of perplexity, ΔNLL and KL on each text, and ours over it on the first."""
    texts = list(runs[0]["perplexity"])
    titles = [f"{text[:14]} {what}" for text in texts for what in ("ppl", "ΔNLL", "KL")]
    head = f"{'model':<18} {'steps':>5} {'target':>6} {'reached':>7} {'variant':<17} {'seeds':>5}"
    lines = [head + "".join(f" {title:>19}" for title in titles) + f" {'ours / it':>16} {'s a run':>8}"]
    grouped = rows(runs)
    for (model, steps, sparsity, variant), group in grouped.items():
        cells = []
        for text in texts:
            perplexity, kl = ([run[what][text] for run in group] for what in ("perplexity", "kl"))
            cells += [_cell(values) for values in (perplexity, lost(runs, group, text), kl)]
        ours = grouped.get((model, steps, sparsity, "ours"), [])
        told = verdict(*({run["seed"]: run["perplexity"][texts[0]] for run in part} for part in (group, ours)))
        reached = statistics.fmean(run.get("reached", 0.0) for run in group)
        seconds = statistics.fmean(run.get("seconds", 0) for run in group)
        line = f"{model[:18]:<18} {steps:>5} {sparsity:>6.0%} {reached:>7.2%} {variant:<17} {len(group):>5}"
        lines.append(line + "".join(f" {cell:>19}" for cell in cells) + f" {told:>16} {seconds:>8.0f}")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    value, error = mean(values)
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"


def picture(runs: list[dict]) -> bytes:
    """ΔNLL on the first text over the steps of a run, a line a row and sparsity, as PNG."""
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axis = figure.subplots()
    text = next(iter(runs[0]["perplexity"]))
    lines: dict[tuple[str, str, float], dict[int, tuple[float, float]]] = {}
    for (model, steps, sparsity, variant), group in rows(runs).items():
        if steps:
            lines.setdefault((model, variant, sparsity), {})[steps] = mean(lost(runs, group, text))
    for (model, variant, sparsity), points in lines.items():
        errors = [0.0 if math.isnan(error) else error for _, error in points.values()]
        axis.errorbar(list(points), [value for value, _ in points.values()], errors, marker="o",
                      label=f"{model}, {variant}, {sparsity:.0%}")  # fmt: skip
    axis.set(xscale="log", xlabel="optimizer steps", ylabel=f"nats a token lost on {text}")
    axis.set_xticks(sorted({steps for points in lines.values() for steps in points}))
    axis.get_xaxis().set_major_formatter("{x:.0f}")
    axis.minorticks_off()
    axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
