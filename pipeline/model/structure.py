"""Which units a set of gates keeps, layer by layer, as index lists on the gates' device.

Found on the host from one copy of all gates, and sent back in one: a device is waited for once, whatever the depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nuteprune.arch import ArchSpec

ALIGNED = 8
"""Elements of 16 bits in the 16 bytes that a GPU loads at once, if a row starts at a multiple of them."""


@dataclass(frozen=True)
class LayerStructure:
    """What one decoder layer keeps; lists are sorted int64 indices, None where everything of theirs is kept.

    Attributes:
        queries, values: rows of the kept query heads and KV groups.
        ffn: kept FFN units of each expert, of the layer where it has none.
        group_size: query heads per group where that is the same for all kept groups, else 1.
        kv_index: [kept heads] group of each kept head where groups are ragged, else None.
        removed: nothing of the layer is left.
        routes: experts among which the router chooses.
    """

    queries: Tensor | None
    values: Tensor | None
    ffn: list[Tensor | None]
    group_size: int
    kv_index: Tensor | None = None
    removed: bool = False
    routes: Tensor | None = None


@dataclass(frozen=True)
class Structure:
    """What a model keeps: its layers, and the dimensions of the residual stream (None: all)."""

    layers: list[LayerStructure]
    hidden: Tensor | None = None


def dense(spec: ArchSpec) -> Structure:
    """The structure in which nothing is left out."""
    return Structure([LayerStructure(None, None, [None] * spec.experts, spec.group_size)] * spec.layers)


def find(
    spec: ArchSpec, heads: Tensor | None, ffn: Tensor | None, hidden: Tensor | None, multiple: int | None = None,
    experts: Tensor | None = None,
) -> Structure:  # fmt: skip
    """The structure of effective gates: [L, H], [L, E·F], [D] and [L, E], None where nothing of a kind is gated.

    Args:
        multiple: FFN units are kept in multiples of this, filled up with removed ones, which their gate of 0 leaves
            without effect; None: `ALIGNED` on an accelerator, which loads rows of other lengths element by element.
        experts: where fewer are open than the router chooses for a token, it chooses closed ones too, which add
            nothing.
    """
    gates = {"heads": heads, "ffn": ffn, "hidden": hidden, "experts": experts}
    present = {kind: gate.detach() for kind, gate in gates.items() if gate is not None}
    if not present or any(isinstance(gate, FakeTensor) for gate in present.values()):  # a dry run knows no values
        return dense(spec)
    flat = torch.cat([(gate != 0).flatten() for gate in present.values()])
    sizes = [gate.numel() for gate in present.values()]
    parts = np.split(flat.cpu().numpy(), np.cumsum(sizes)[:-1])
    kept = {kind: part.reshape(gate.shape) for (kind, gate), part in zip(present.items(), parts, strict=True)}
    multiple = multiple or (1 if flat.device.type == "cpu" else ALIGNED)
    found = _Lists()
    layers = []
    for index in range(spec.layers):
        queries, values, group_size, kv_index, gone = _attention(spec, kept["heads"][index]) if "heads" in kept else (
            None, None, spec.group_size, None, False)  # fmt: skip
        units: list[np.ndarray | None] = [None] * spec.experts
        if "ffn" in kept:
            units = [_indices(own, multiple) for own in kept["ffn"][index].reshape(spec.experts, spec.ffn)]
        routes = _at_least(kept["experts"][index], spec.top_k) if "experts" in kept else None
        removed = gone and all(own is not None and len(own) == 0 for own in units)
        numbers = [found.add(part) for part in (queries, values, kv_index, routes)]
        layers.append((numbers, [found.add(own) for own in units], group_size, removed))
    stream = found.add(_indices(kept["hidden"]) if "hidden" in kept else None)
    lists = found.on(flat.device)
    return Structure(
        [LayerStructure(lists[q], lists[v], [lists[own] for own in f], size, lists[kv], removed, lists[routes])
         for (q, v, kv, routes), f, size, removed in layers],
        lists[stream],
    )  # fmt: skip


class _Lists:
    """Index lists that travel to a device together."""

    def __init__(self):
        self.parts: list[np.ndarray] = []

    def add(self, part: np.ndarray | None) -> int | None:
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


def _indices(kept: np.ndarray, multiple: int = 1) -> np.ndarray | None:
    """Sorted indices of the kept units and of as many removed ones as make a multiple; None if that is all of them."""
    missing = -int(kept.sum()) % multiple
    if missing:
        kept = kept.copy()
        kept[np.flatnonzero(~kept)[:missing]] = True
    return None if kept.all() else np.flatnonzero(kept)


def _at_least(kept: np.ndarray, count: int) -> np.ndarray | None:
    """Sorted indices of the kept units, and of the first removed ones where they are fewer; None if that is all."""
    missing = count - int(kept.sum())
    if missing > 0:
        kept = kept.copy()
        kept[np.flatnonzero(~kept)[:missing]] = True
    return None if kept.all() else np.flatnonzero(kept)


def _attention(spec: ArchSpec, kept: np.ndarray) -> tuple:
    """Rows of the kept heads and groups, query heads per group, the group of each head, whether no head is left."""
    heads = _indices(kept)
    if heads is None:
        return None, None, spec.group_size, None, False
    groups, index, counts = np.unique(heads // spec.group_size, return_inverse=True, return_counts=True)
    if len(groups) and (counts == counts[0]).all():
        size, kv_index = int(counts[0]), None
    else:
        size, kv_index = 1, index.reshape(-1)
    return _rows(spec, heads), _rows(spec, groups), size, kv_index, len(heads) == 0


def _rows(spec: ArchSpec, units: np.ndarray) -> np.ndarray:
    """Row indices of the given heads or groups, [len(units)·P]."""
    return (units[:, None] * spec.head_dim + np.arange(spec.head_dim)).reshape(-1)
