"""The ladder: several sparsities exported from one run, compared with the intact model, and the knee among them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nuteprune.config import Config
from nuteprune.errors import UserError
from nuteprune.evaluation import pictures, report
from nuteprune.evaluation.compare import checked, evaluate_models
from nuteprune.evaluation.contents import nats, number
from nuteprune.evaluation.speed import SPEEDS, speed_ratio
from nuteprune.exporting.card import RECORD
from nuteprune.exporting.small import export_model
from nuteprune.runs.checkpoint import MANIFEST, write_atomic, write_manifest
from nuteprune.runs.students import choose_student, open_run
from nuteprune.runs.words import code

log = logging.getLogger(__name__)


def run(config: Config) -> Path:
    """Export every rung of `export.ladder`, evaluate all of them with the intact model in one run, and compare.

    Returns:
        The directory (`export.output`, or `ladder` below the run directory) with a model per rung, `evaluate/` and
        ladder.md, ladder.png, ladder.json.

    Raises:
        UserError: a rung that the run never reached, a model in the directory, a report elsewhere or of other models,
            or a mistake in what is evaluated, before anything is exported; or as the two stages.
        ExportError: as `export_model`.
    """
    rungs = sorted(set(config.export.ladder))
    if not all(0 < rung < 1 for rung in rungs):
        raise UserError(f"export.ladder: sparsities lie between 0 and 1, got {config.export.ladder}")
    if config.export.push_to_hub:
        raise UserError("export.push_to_hub takes one model: push a rung with `nuteprune export RUN --sparsity …`")
    for key in ("output", "models"):
        if getattr(config.evaluate, key):
            raise UserError(
                f"evaluate.{key} has no place beside export.ladder: a ladder compares its own rungs, and its report is "
                f"`evaluate` below it; leave that out, or give evaluate.{key}={'[]' if key == 'models' else ''} too"
            )
    trained = open_run(config.run_dir, config.model)
    output = Path(config.export.output or trained.directory / "ladder")
    if (output / "config.json").is_file():
        raise UserError(f"export.output {output} is a model, no place for a ladder of them: choose another directory")
    for rung in rungs:
        choose_student(trained, rung)
    base = trained.config.model
    checked(replace(config, model=base), [base.path])
    (output / MANIFEST).unlink(missing_ok=True)  # a ladder that is being replaced is not complete
    models = {rung: _export(config, output / f"{rung:g}", rung) for rung in rungs}
    paths = [base.path, *map(str, models.values())]
    settings = replace(config.evaluate, models=paths, output=str(output / "evaluate"))
    result = evaluate_models(replace(config, model=base, evaluate=settings))
    entries = {entry["path"]: entry for entry in result["models"]}
    points = [_point(entries[path], result["models"][0], rung)
              for rung, path in zip([0.0, *rungs], paths, strict=True)]  # fmt: skip
    for point in points[1:]:
        rung = point["sparsity"]
        record = json.loads((models[rung] / RECORD).read_text(encoding="utf-8"))
        point |= {what: record[what] for what in ("recovered", "finetuned") if record.get(what)}
    _write(output, points, result)
    return output


def knee(points: list[dict]) -> int | None:
    """Index of the rung after which quality falls faster than size: the one furthest below the chord of the curve.

    Over the removed share of the parameters and the log perplexity, each scaled to 0…1, the chord runs from the intact
    model to the sparsest rung (Satopaa et al. 2011, "Kneedle"). None with less than two rungs, or where none is below.
    """
    if len(points) < 3 or not all(_is_number(point["perplexity"]) for point in points):
        return None
    size = [points[0]["parameters"] - point["parameters"] for point in points]
    loss = [math.log(point["perplexity"] / points[0]["perplexity"]) for point in points]
    if size[-1] <= 0 or loss[-1] <= 0:
        return None
    below = [x / size[-1] - y / loss[-1] for x, y in zip(size, loss, strict=True)]
    best = max(range(1, len(points) - 1), key=below.__getitem__)
    return best if below[best] > 0 else None


def table(points: list[dict], best: int | None) -> str:
    """The rungs as a Markdown table; the knee's line is bold."""
    ratio = "{:.2f}".format
    columns: dict[str, Callable[[dict], str]] = {
        "sparsity": lambda p: f"{p['sparsity']:.0%}" if p["sparsity"] else "intact",
        "parameters": lambda p: f"{p['parameters']:,}",
        "bytes": lambda p: f"{p['bytes']:,}",
        "perplexity": lambda p: number(p["perplexity"]),
    }
    optional = {
        "delta_nll": ("ΔNLL", nats), "loops": ("loops", "{:.0%}".format),
        "recovered": ("recovered, steps", "{:,}".format), "finetuned": ("fine-tuned, steps", "{:,}".format),
        "prefill": ("prefill", ratio), "decode": ("decode", ratio), "retained": ("retained", "{:.1%}".format),
    }  # fmt: skip
    for key, (title, form) in optional.items():
        if any(key in point for point in points):
            columns[title] = _cells(key, form)
    rows = [list(columns)] + [[cell(point) for cell in columns.values()] for point in points]
    if best is not None:
        rows[best + 1] = [f"**{cell}**" for cell in rows[best + 1]]
    return report.markdown_table(rows)


def _cells(key: str, form: Callable[..., str]) -> Callable[[dict], str]:
    """A column of what only some rungs have."""
    return lambda point: form(point[key]) if key in point else ""


def _export(config: Config, output: Path, rung: float) -> Path:
    return export_model(replace(config, export=replace(config.export, ladder=[], sparsity=rung, output=str(output))))


def _point(entry: dict, intact: dict, rung: float) -> dict:
    """What is drawn of one model."""
    point = {"sparsity": rung, "perplexity": _perplexity(entry)} | {key: entry[key] for key in ("parameters", "bytes")}
    if rung:
        point["delta_nll"] = next(iter(entry["perplexity"].values()))["delta_nll"]
    if "generation" in entry:
        point["loops"] = entry["generation"]["loops"]
    if "speed" in entry:
        batch = next(iter(intact["speed"]))
        faster = speed_ratio(intact["speed"][batch], entry["speed"][batch])
        point |= {key.removesuffix("_tokens_per_s"): faster[key] for key in SPEEDS}
    kept = entry.get("retained", {}).get("acc_norm")
    return point | ({"retained": kept["value"]} if kept else {})


def _perplexity(entry: dict) -> float | None:
    """Perplexity of the first text; None where it is not finite."""
    return next(iter(entry["perplexity"].values()))["perplexity"]


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _write(output: Path, points: list[dict], result: dict) -> None:
    best, text = knee(points), next(iter(result["models"][0]["perplexity"]))
    parts = [
        "# The ladder", table(points, best),
        f"Perplexity of {code(text)}, speeds relative to the intact model, all measured in one run; "
        "[conditions and details](evaluate/report.md).",
    ]  # fmt: skip
    if best is not None:
        parts.append(f"The knee is {points[best]['sparsity']:.0%}: beyond it perplexity rises faster than size falls.")
    parts.append("![Perplexity and speed against size](ladder.png)")
    files = {
        "ladder.json": (json.dumps({"points": points, "knee": best}, indent=1) + "\n").encode(),
        "ladder.md": ("\n\n".join(parts) + "\n").encode(),
        "ladder.png": pictures.ladder(points, best),
    }
    for name, data in files.items():
        write_atomic(output / name, data)
    write_manifest(output, files)
    log.info("ladder: %s", output / "ladder.md")
