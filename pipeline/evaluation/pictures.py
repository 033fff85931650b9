"""Pictures of the report: what each layer kept, loss and sparsity over the steps, and the ladder."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nuteprune.runs.checkpoint import CheckpointError, read_json
from nuteprune.runs.directories import distill_directory, instruct_directory
from nuteprune.training.pictures import WIDTH, kept_figure, png

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
UNITS = {"kv_groups": "kv_heads", "heads": "heads", "ffn": "ffn"}
"""Per-layer units, and their key among the original counts."""

PAGE_COLOURS = {"#000000": "currentColor", "#2b6cb0": "var(--blue)", "#c05621": "var(--orange)"}
"""What stands for a colour of ours where the page chooses, as it does for bright and dark."""


def svg(figure: Figure, name: str) -> str:
    """A figure as SVG for a page: no background, text as text, the page's colours, no id but what it refers to.

    Args:
        name: told apart by it are the references of several figures in one page.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawn = buffer.getvalue()
    drawn = re.sub(r' id="[\w.]+_\d+"', "", drawn[drawn.index("<svg") :])
    for ours, pages in PAGE_COLOURS.items():
        drawn = drawn.replace(ours, pages)
    return drawn


def kept(file: Path, width: float = WIDTH) -> Figure | None:
    """Bars of the units that each layer kept, over the count it had, from an export's nuteprune.json.

    Args:
        file: JSON with `kept` {unit: by layer the indices that stayed; `hidden` of the model}, `original` counts.

    Returns:
        The picture; None where there is no such file or it lists no units.
    """
    if not file.is_file():
        return None
    try:
        return _kept(read_json(file), width)
    except (CheckpointError, ValueError, TypeError, AttributeError, LookupError) as error:
        log.warning("no picture of the kept units, %s is not a record of ours: %s", file, error)
        return None


def _kept(facts: dict, width: float) -> Figure | None:
    original = facts.get("original", {})
    original |= {"ffn": original.get("ffn", 0) * original.get("experts", 1)}  # its count is that of one expert
    gates = {}
    for unit, key in UNITS.items():
        layers = facts.get("kept", {}).get(unit)
        if isinstance(layers, list) and layers:
            gates[unit] = _as_gates(list(map(len, layers)), original.get(key))
    hidden = facts.get("kept", {}).get("hidden")
    # Units that all stayed, and heads that left with their KV groups alone, say nothing of their own.
    gone = {unit: values for unit, values in gates.items() if not values.all()} or gates
    groups, heads = (gone.get(unit) for unit in ("kv_groups", "heads"))
    if groups is not None and heads is not None and torch.equal(groups.mean(1), heads.mean(1)):
        del gone["heads"]
    gates = gone
    if gates and hidden and original.get("hidden"):
        gates["hidden"] = _as_gates([len(hidden)], original["hidden"])
    return kept_figure(gates, width) if gates else None


def _as_gates(counts: list[int], total: int | None) -> Tensor:
    """Counts of kept units as gates [L, U]."""
    return (torch.arange(total or max(counts)) < torch.tensor(counts)[:, None]).float()


def training(run_dir: Path, width: float = WIDTH) -> Figure | None:
    """Loss, its running mean, and sparsity (expected and target) over the steps of `prune`; then the loss of `distill`.

    Args:
        run_dir: a run, whose metrics.jsonl has a JSON object a line with `step` and `prune/…` numbers. A step that was
            run again after a resume counts as it was last; lines cut off by a crash are left out.

    Returns:
        The picture; None where there is no such file or it holds no loss.
    """
    steps = read_metrics(run_dir / METRICS)
    loss = _series(steps, "prune/loss")
    if not loss[0]:
        return None
    distilled = _series(read_metrics(distill_directory(run_dir) / METRICS), "distill/loss")
    panels = 3 if distilled[0] else 2
    figure = Figure(figsize=(width, 2.3 * panels), layout="constrained")
    above, middle, *below = figure.subplots(panels)
    _losses(above, loss, "loss, prune")
    expected, target = (_series(steps, f"prune/{name}_sparsity") for name in ("expected", "target"))
    middle.plot(*_percent(expected), color="#c05621", linewidth=3.0, alpha=0.8, label="expected")
    middle.plot(*_percent(target), color="black", linewidth=1.0, linestyle="--", label="target")
    middle.set_ylabel("sparsity (%)")
    middle.legend(loc="lower right", fontsize=9, frameon=False)
    for axis in below:
        _losses(axis, distilled, "loss, distill")
    figure.axes[-1].set_xlabel("step")
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    return figure


def _losses(axis: Axes, loss: tuple[list[int], list[float]], label: str) -> None:
    """A loss of each step, pale, and its mean over a window of a twentieth of the steps."""
    steps, values = loss
    window = max(1, len(values) // 20)
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    axis.plot(steps, values, color="#2b6cb0", linewidth=0.8, alpha=0.35)
    axis.plot(steps[window - 1 :], mean, color="#2b6cb0", linewidth=1.6)
    axis.set_ylabel(label)
    if min(values) > 0 and max(values) > 20 * min(values):
        axis.set_yscale("log")


def training_seconds(run_dir: Path) -> dict[str, float]:
    """Seconds that the steps of each stage of a run took, by the times in its metrics."""
    found: dict[str, float] = {}
    for directory in (run_dir, distill_directory(run_dir), instruct_directory(run_dir)):
        last: dict[str, int] = {}
        for step, entry in sorted(read_metrics(directory / METRICS).items()):
            for key in entry:
                stage, _, name = key.partition("/")
                if name == "step_s" and isinstance(entry[key], (int, float)):
                    # An entry stands for the steps since the one before it.
                    found[stage] = found.get(stage, 0.0) + entry[key] * (step - last.get(stage, -1))
                    last[stage] = step
    return found


def ladder(points: list[dict], knee: int | None) -> bytes:
    """Perplexity, and speed over the intact model's, against size.

    Args:
        points: from the intact model to the sparsest, with `parameters`, `perplexity` (None: not finite), `sparsity`,
            and where they were measured `prefill` and `decode` ratios.
        knee: index of the rung to mark.
    """
    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    size = [point["parameters"] / 1e6 for point in points]
    above.plot(size, [point["perplexity"] for point in points], "o-", color="#2b6cb0")
    above.set_yscale("log")
    above.set_ylabel("perplexity")
    for x, point in zip(size, points, strict=True):
        if point["perplexity"] is not None:
            label = f"{point['sparsity']:.0%}" if point["sparsity"] else "intact"
            above.annotate(label, (x, point["perplexity"]), textcoords="offset points", xytext=(6, 6), fontsize=9)
    for name, colour in (("prefill", "#c05621"), ("decode", "#2f855a")):
        if all(name in point for point in points):
            below.plot(size, [point[name] for point in points], "o-", color=colour, label=name)
            below.legend(loc="upper right", fontsize=9)
    below.set_ylabel("speed over the intact model")
    below.set_xlabel("million parameters")
    for axis in (above, below):
        axis.grid(alpha=0.3)
        if knee is not None:
            axis.axvline(size[knee], color="black", linestyle="--", linewidth=1.0)
    if knee is not None:
        above.set_title(f"knee: {points[knee]['sparsity']:.0%}", size=10, loc="left")
    return png(figure)


def read_metrics(file: Path) -> dict[int, dict]:
    """By step what a metrics.jsonl says of it; empty where there is no such file."""
    if not file.is_file():
        return {}
    steps: dict[int, dict] = {}
    lost = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            steps.setdefault(int(entry["step"]), {}).update(entry)
        except (ValueError, KeyError, TypeError):
            lost += 1
    if lost:
        log.warning("%s: lines left out because they are not metrics: %d", file, lost)
    return steps


def _series(steps: dict[int, dict], key: str) -> tuple[list[int], list[float]]:
    """The steps that have a number under a key, in order, and the numbers."""
    found = [(step, steps[step][key]) for step in sorted(steps) if isinstance(steps[step].get(key), (int, float))]
    return [step for step, _ in found], [value for _, value in found]


def _percent(series: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    return series[0], [100 * value for value in series[1]]
