"""The evaluation's report on disk: report.html, report.md, report.json, pictures and the manifest; and plain tables."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nuteprune.evaluation import contents, page, pictures
from nuteprune.runs.checkpoint import MANIFEST, write_atomic, write_manifest
from nuteprune.runs.words import code, markdown_words, plain
from nuteprune.training.pictures import WIDTH, png

log = logging.getLogger(__name__)


def write(report: dict, output: Path, run_dir: Path | None) -> dict:
    """Write the report's files into `output`, each by renaming a finished one; `manifest.json` comes last.

    Args:
        report: the result of the evaluate stage.
        output: directory of report.html, report.md, report.json, kept.png (where the last model is an export of ours)
            and training.png (where the run has a metrics.jsonl); made if need be.
        run_dir: the run's directory, for its metrics.

    Returns:
        The report as written: numbers that JSON cannot hold (infinite, NaN) are None, `pictures` lists the images.
    """
    output.mkdir(parents=True, exist_ok=True)
    # A report that is being replaced is not complete.
    (output / MANIFEST).unlink(missing_ok=True)
    images = {f"{name}.png": png(figure) for name, figure in _draw(report, run_dir, WIDTH).items()}
    drawings = {name: pictures.svg(figure, name) for name, figure in _draw(report, run_dir, page.WIDTH).items()}
    report = _finite(report | {"pictures": sorted(images)})
    files = {
        **images,
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "report.md": markdown(report).encode(),
        "report.html": page.html(report, drawings).encode(),
    }
    for name, data in files.items():
        write_atomic(output / name, data)
    write_manifest(output, files)
    log.info("report: %s", output / "report.html")
    return report


def _draw(report: dict, run_dir: Path | None, width: float) -> dict[str, Figure]:
    """The pictures there is something for, by name, so many inches wide."""
    drawn = {
        "kept": pictures.kept(Path(report["models"][-1]["path"]) / "nuteprune.json", width),
        "training": pictures.training(run_dir, width) if run_dir else None,
    }
    return {name: figure for name, figure in drawn.items() if figure}


def write_draft(draft: dict, output: Path) -> None:
    """Keep what was measured so far as report.json, marked as unfinished; the manifest of a report before it goes."""
    output.mkdir(parents=True, exist_ok=True)
    (output / MANIFEST).unlink(missing_ok=True)
    text = json.dumps(_finite({"unfinished": True} | draft), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(output / "report.json", (text + "\n").encode())


def table(report: dict) -> str:
    """The numbers as aligned plain text: one column a model, then the last over the first."""
    found = contents.rows(report)
    widths = [max(len(row[column]) for row in found) for column in range(len(found[0]))]
    lines = []
    for label, *cells in found:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *padded]).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(report: dict) -> str:
    """The whole report as Markdown."""
    parts = [
        "# Evaluation",
        contents.headline(report),
        " ".join(contents.made_lines(report)),
        results(report),
        *samples(report),
    ]
    if "kept.png" in report["pictures"]:
        parts += ["## What each layer kept", "![Kept units of each layer](kept.png)"]
    if "training.png" in report["pictures"]:
        parts += ["## Loss and sparsity over time", "![Loss and sparsity over the steps](training.png)"]
    parts += [
        "## Load it",
        "\n".join(f"    {line}" for line in contents.load_lines(report)),
        "## Models",
        _listed(contents.model_lines(report)),
        "## Measured with",
        _listed(contents.environment_lines(report)),
    ]
    return "\n\n".join(parts) + "\n"


def results(report: dict) -> str:
    """The report's numbers and how they were measured, as Markdown."""
    parts = [_marked_table(contents.rows(report)), *contents.conditions(report)]
    if tasks := contents.task_rows(report):
        parts += [_marked_table(tasks), contents.task_conditions(report)]
    return "\n\n".join(parts)


def for_card(report: dict) -> str:
    """What a model's card says of it: the results and the samples, as Markdown."""
    return "\n\n".join([results(report), *samples(report)])


def samples(report: dict) -> list[str]:
    """What the models wrote behind the same places of a text, as paragraphs of Markdown."""
    parts = ["## Samples"]
    for written in contents.samples(report):
        prompt = written[0]["prompt"]
        parts += [f"Behind {code(prompt)}"]
        for title, own in zip(contents.titles(report), written, strict=True):
            behind = "" if own["prompt"] == prompt else f", behind {code(own['prompt'])}"
            # Indented blocks: a model may write anything, fences of its own included.
            lines = [f"    {plain(line)}" for line in own["continuation"].splitlines() or [""]]
            parts.append("\n".join([f"**{markdown_words(title)}**{behind}{', a loop' * own['loops']}\n", *lines]))
    return parts if len(parts) > 1 else []


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table whose first row is its head and whose first column holds labels."""
    lines = ["| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def _marked_table(rows: list[list[str]]) -> str:
    return markdown_table([[markdown_words(cell) for cell in row] for row in rows])


def _listed(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _finite(tree: Any) -> Any:
    """A copy of nested dicts and lists in which numbers that are not finite are None."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
