"""What each layer keeps, as a picture: bars over the layers, while a run goes and in its report."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

WIDTH = 9.0
"""Inches; at 100 dots per inch the width of a rendered Markdown page, so that labels are read at their own size."""
LABELS = {"kv_groups": "KV groups", "heads": "query heads", "ffn": "FFN units"}
"""Per-layer kinds in drawing order."""
COLOURS = LinearSegmentedColormap.from_list("gates", ["#8696a650", "#2b6cb0"])
"""From a gate of 0 (removed) to 1 (kept); the first lets a page's own colour through, bright or dark."""


def kept_picture(gates: Mapping[str, Tensor], width: float = WIDTH) -> bytes:
    """The picture of `kept_figure` as PNG."""
    return png(kept_figure(gates, width))


def kept_figure(gates: Mapping[str, Tensor], width: float = WIDTH) -> Figure:
    """A bar for each layer, of its gates in order of their value: the kept ones below, and how sure they are by shade.

    Args:
        gates: [L, U] in 0..1 by kind; `hidden` is [1, D] and stands in the title.
        width: inches.
    """
    panels = [(label, gates[kind].detach().float().cpu()) for kind, label in LABELS.items() if kind in gates]
    figure = Figure(figsize=(width, 0.6 + 1.8 * len(panels)), layout="constrained")
    for axis, (label, values) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        layers, units = values.shape
        bars = np.repeat(values.sort(dim=1, descending=True).values.numpy().T, 5, axis=1)
        bars[:, 4::5] = np.nan  # the gap between two layers
        axis.imshow(bars, origin="lower", aspect="auto", interpolation="none", cmap=COLOURS, vmin=0, vmax=1,
                    extent=(-0.4, layers - 0.4, 0, units))  # fmt: skip
        kept = float((values > 0).sum(1).double().mean())
        axis.set_title(f"{label}: {kept:,.1f} of {units:,} kept on average", size=10, loc="left")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for scale in (axis.xaxis, axis.yaxis):
            scale.get_major_locator().set_params(integer=True)
    axis.set_xlabel("layer")
    hidden = gates.get("hidden")
    if hidden is not None and not torch.all(hidden > 0):
        figure.suptitle(f"Hidden dimensions: {int((hidden > 0).sum()):,} of {hidden.numel():,} kept", size=10)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
