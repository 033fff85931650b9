"""The rows and columns of each layer's weights that kept units are, as index lists on a device, sent there in one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.masks import Kept

ALIGNED = 8
"""Elements of 16 bits in the 16 bytes that a GPU loads at once, if a row starts at a multiple of them."""
_List = np.ndarray | None


@dataclass(frozen=True)
class LayerLists:
    """What one decoder layer keeps; lists are sorted int64 indices, None where everything of theirs is kept.

    Attributes:
        queries, values: rows of the kept query heads and KV groups.
        ffn: kept FFN units of each expert, of the layer where it has none.
        group_size: query heads per group where that is the same for all kept groups, else 1.
        kv_index: [kept heads] group of each kept head where groups are ragged, else None.
        removed: nothing of the layer is left.
        routes: experts among which the router chooses; where fewer are kept than it chooses for a token, it chooses
            removed ones too, which add nothing.
    """

    queries: Tensor | None
    values: Tensor | None
    ffn: list[Tensor | None]
    group_size: int
    kv_index: Tensor | None
    removed: bool
    routes: Tensor | None


def index_lists(
    kept: Kept, device: torch.device, multiple: int | None = None
) -> tuple[list[LayerLists], Tensor | None]:
    """The lists of each layer, and that of the residual stream's dimensions.

    Args:
        kept: the units that stay.
        device: where the lists shall be.
        multiple: FFN units are kept in multiples of this, filled up with removed ones, which their gate of 0 leaves
            without effect; None: `ALIGNED` on an accelerator, which loads rows of other lengths element by element.
    """
    multiple = multiple or (1 if device.type == "cpu" else ALIGNED)
    found, spec, layers = _Lists(), kept.spec, []
    for heads_KG, ffn_EF, experts_E in zip(kept.heads_LKG, kept.ffn_LEF, kept.experts_LE, strict=True):
        queries, values, group_size, kv_index = _attention(spec, heads_KG)
        routes = _indices(experts_E, max(0, spec.top_k - int(experts_E.sum())))
        numbers = [found.add(part) for part in (queries, values, kv_index, routes)]
        units = [found.add(_indices(own, -int(own.sum()) % multiple)) for own in ffn_EF]
        layers.append((numbers, units, group_size, not heads_KG.any() and not ffn_EF.any()))
    stream = found.add(_indices(kept.hidden_D))
    lists = found.on(device)
    return [
        LayerLists(
            lists[queries], lists[values], [lists[own] for own in units], size, lists[kv], removed, lists[routes]
        )
        for (queries, values, kv, routes), units, size, removed in layers
    ], lists[stream]


class _Lists:
    """Index lists that travel to a device together."""

    def __init__(self):
        self.parts: list[np.ndarray] = []

    def add(self, part: _List) -> int | None:
        """The number under which a list is found later."""
        if part is None:
            return None
        self.parts.append(part)
        return len(self.parts) - 1

    def on(self, device: torch.device) -> dict[int | None, Tensor | None]:
        """The lists by number."""
        if not self.parts:
            return {None: None}
        joined = torch.from_numpy(np.concatenate(self.parts).astype(np.int64, copy=False))
        if device.type == "cuda":  # from pageable memory the copy would wait for the card
            joined = joined.pin_memory().to(device, non_blocking=True)
        return {None: None, **dict(enumerate(joined.split([len(part) for part in self.parts])))}


def _indices(kept: np.ndarray, more: int = 0) -> _List:
    """Sorted indices of the kept units and of so many of the first removed ones; None if that is all of them."""
    if more:
        kept = kept.copy()
        kept[np.flatnonzero(~kept)[:more]] = True
    return None if kept.all() else np.flatnonzero(kept)


def _attention(
    spec: ArchSpec, kept_KG: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None, int, np.ndarray | None]:
    """Rows of the kept heads and groups, query heads per group, the group of each head where that is needed."""
    if kept_KG.all():
        return None, None, spec.group_size, None
    groups = np.flatnonzero(kept_KG.any(1))
    counts = kept_KG.sum(1)[groups]
    even = len(groups) > 0 and bool((counts == counts[0]).all())
    kv_index: _List = None if even else np.repeat(np.arange(len(groups)), counts)
    return _rows(spec, np.flatnonzero(kept_KG)), _rows(spec, groups), int(counts[0]) if even else 1, kv_index


def _rows(spec: ArchSpec, units: np.ndarray) -> np.ndarray:
    """Row indices of the given heads or groups, [len(units)·P]."""
    return (units[:, None] * spec.head_dim + np.arange(spec.head_dim)).reshape(-1)
