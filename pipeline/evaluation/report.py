"""The evaluation's report on disk: report.json, report.md, pictures and the manifest; and the table of the demo."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from nuteprune.evaluation import pictures
from nuteprune.runs.checkpoint import MANIFEST, write_atomic, write_manifest
from nuteprune.runs.words import code, markdown_words, plain

log = logging.getLogger(__name__)

ROWS = {
    "parameters": "parameters",
    "  without embeddings": "parameters_non_embedding",
    "bytes on disk": "bytes",
    "mean task accuracy": "accuracy",
}
SPEED_ROWS = {
    "prefill tokens/s": "prefill_tokens_per_s",
    "decode tokens/s": "decode_tokens_per_s",
    "peak memory, bytes": "peak_memory_bytes",
}
"""Lines of the table: label and key of a model, or of its speed at a number of sequences."""


def write(report: dict, output: Path, run_dir: Path | None) -> dict:
    """Write the report's files into `output`, each by renaming a finished one; `manifest.json` comes last.

    Args:
        report: the result of the evaluate stage.
        output: directory of report.json, report.md, kept.png (where the last model is an export of ours) and
            training.png (where the run has a metrics.jsonl); made if need be.
        run_dir: the run's directory, for its metrics.

    Returns:
        The report as written: numbers that JSON cannot hold (infinite, NaN) are None, `pictures` lists the images.
    """
    output.mkdir(parents=True, exist_ok=True)
    # A report that is being replaced is not complete.
    (output / MANIFEST).unlink(missing_ok=True)
    drawn = {
        "kept.png": pictures.kept(Path(report["models"][-1]["path"]) / "nuteprune.json"),
        "training.png": pictures.training(run_dir / "metrics.jsonl") if run_dir else None,
    }
    images = {name: image for name, image in drawn.items() if image}
    report = _finite(report | {"pictures": sorted(images)})
    files = {
        **images,
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "report.md": markdown(report).encode(),
    }
    for name, data in files.items():
        write_atomic(output / name, data)
    write_manifest(output, files)
    log.info("report: %s", output / "report.md")
    return report


def write_draft(draft: dict, output: Path) -> None:
    """Keep what was measured so far as report.json, marked as unfinished; the manifest of a report before it goes."""
    output.mkdir(parents=True, exist_ok=True)
    (output / MANIFEST).unlink(missing_ok=True)
    text = json.dumps(_finite({"unfinished": True} | draft), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(output / "report.json", (text + "\n").encode())


def table(report: dict) -> str:
    """Sizes, perplexity and speed as aligned plain text: one column a model, then the last over the first."""
    rows = _rows(report)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for label, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *padded]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(report: dict) -> str:
    """The whole report as Markdown."""
    parts = ["# Evaluation", results(report)]
    if report["prompt"]:
        parts += ["## Samples", f"Greedy continuations of {code(report['prompt'])}:"]
        # Indented blocks: a model may write anything, fences of its own included.
        parts += [
            f"**{title}**\n\n" + "\n".join(f"    {plain(line)}" for line in model["sample"].splitlines() or [""])
            for title, model in zip(_titles(report), report["models"], strict=True)
        ]
    if "kept.png" in report["pictures"]:
        parts += ["## What each layer kept", "![Kept units of each layer](kept.png)"]
    if "training.png" in report["pictures"]:
        parts += ["## Loss and sparsity over time", "![Loss and sparsity over the steps](training.png)"]
    parts += ["## Models", "\n".join(_model_lines(report)), "## Measured with", "\n".join(_environment_lines(report))]
    return "\n\n".join(parts) + "\n"


def results(report: dict) -> str:
    """The report's numbers and how they were measured, as Markdown."""
    parts = [markdown_table(_rows(report)), _conditions(report)]
    if any("tasks" in model for model in report["models"]):
        parts += [markdown_table(_task_rows(report)), _task_conditions(report)]
    return "\n\n".join(parts)


def _titles(report: dict) -> list[str]:
    """Column titles: before and after for a pair, the models' names otherwise."""
    names = [markdown_words(model["name"]) for model in report["models"]]
    return ["before", "after"] if len(names) == 2 else names


def _rows(report: dict) -> list[list[str]]:
    """The table's cells; rows that nothing was measured for are left out."""
    models, ratio = report["models"], report["ratio"]
    rows = [["", *_titles(report), *(["ratio"] if ratio else [])]]

    def add(label: str, values: list, ratio: float | None) -> None:
        rows.append([label, *map(number, values)] + ([_fraction(ratio)] if report["ratio"] else []))

    for label, key in ROWS.items():
        if models[0].get(key) is not None:
            add(label, [model[key] for model in models], ratio.get(key))
    for text in models[0]["perplexity"]:
        scores = [model["perplexity"][text]["perplexity"] for model in models]
        add(f"perplexity of {markdown_words(text)}", scores, ratio.get("perplexity", {}).get(text))
    for batch in models[0].get("speed", {}):
        for label, key in SPEED_ROWS.items():
            values = [model["speed"][batch][key] for model in models]
            if values[0] is not None:
                add(f"{label}, batch {batch}", values, ratio.get("speed", {}).get(batch, {}).get(key))
    return rows


def number(value: float | None) -> str:
    """A count or a measured number for a table; None stands for one that is not finite."""
    if value is None:
        return "infinite"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4f}"


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _task_rows(report: dict) -> list[list[str]]:
    rows = [["task", "version", "few-shot", "examples", "metric", *_titles(report)]]
    for name, task in report["models"][0]["tasks"].items():
        for metric in task["metrics"]:
            scores = [model["tasks"][name]["metrics"][metric] for model in report["models"]]
            facts = [str(task[key]) if task[key] is not None else "-" for key in ("version", "fewshot", "examples")]
            rows.append([markdown_words(name), *facts, markdown_words(metric), *(_score(score) for score in scores)])
    return rows


def _score(score: dict) -> str:
    value = score["value"]
    text = f"{value:.4f}" if isinstance(value, (int, float)) else str(value)
    return text if score["stderr"] is None else f"{text} ± {score['stderr']:.4f}"


def _task_conditions(report: dict) -> str:
    limit = f"the first {report['task_limit']} examples of each" if report["task_limit"] else "all examples"
    lines = [f"Score ± standard error by lm-eval {report['environment']['lm_eval']}, {limit}."]
    kept = [f"{title} {model['retained']:.1%}" for title, model in zip(_titles(report), report["models"], strict=True)
            if "retained" in model][1:]  # fmt: skip
    if kept:
        lines.append(f"Retained performance (mean `acc` over the first model's): {', '.join(kept)}.")
    return " ".join(lines)


def _conditions(report: dict) -> str:
    """How perplexity and speed were measured, in sentences."""
    first, lines = report["models"][0], []
    for text, score in first["perplexity"].items():
        how = "side by side" if score["stride"] == score["window"] else "sliding"
        lines.append(
            f"Perplexity of {code(text)}: {score['blocks']} window{'s' * (score['blocks'] > 1)} of {score['window']} "
            f"tokens, stride {score['stride']} ({how}), mean over {score['tokens']:,} predicted tokens, weights in "
            f"{report['dtype']}."
        )
    if not report["held_out"]:
        lines.append("This is the text the model was pruned on, not a held-out one.")
    if not report["same_tokens"]:
        lines.append("The models' tokenizers differ, so their perplexities per token cannot be compared.")
    if "speed" in first:
        measured = next(iter(first["speed"].values()))
        lines.append(
            f"Speed: {measured['prompt_tokens']} prompt tokens, {measured['new_tokens']} greedy steps with the KV "
            f"cache, {' or '.join(first['speed'])} sequences at once, median of {measured['repeats']} rounds in which "
            f"the models took turns, on {measured['device']} (CPU threads: {measured['threads']}); the ratio is the "
            "median of the rounds' ratios. Peak memory: the weights and what generation adds to the process."
        )
    if report.get("speed_missing"):
        lines.append(f"Speed was not measured: {report['speed_missing']}.")
    if "ceiling" in report["ratio"]:
        most = report["ratio"]["ceiling"]
        lines.append(
            f"Ceiling of the speed-up where time goes by the weights read: 1/(1 − p·s) = {most['speedup']:.2f} with "
            f"p = {most['prunable']:.1%} prunable of what a token reads, s = {most['sparsity']:.1%} removed."
        )
    return " ".join(lines)


def _model_lines(report: dict) -> list[str]:
    return [f"- {title}: {code(m['path'])}" for title, m in zip(_titles(report), report["models"], strict=True)]


def _environment_lines(report: dict) -> list[str]:
    return [f"- {key}: {value}" for key, value in report["environment"].items() if value is not None]


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table whose first row is its head and whose first column holds labels."""
    lines = ["| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def _finite(tree: Any) -> Any:
    """A copy of nested dicts and lists in which numbers that are not finite are None."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
