"""One set of gate values, and what they mean for each projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import get_args

import torch
from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import Unit

KINDS: tuple[str, ...] = get_args(Unit)


def unit_shape(spec: ArchSpec, kind: str) -> tuple[int, ...]:
    """Shape of a kind's gates: [L, H], [L, K], [L, E·F], [D], [L], [L], [L], [L, E]."""
    return {
        "heads": (spec.layers, spec.heads),
        "kv_groups": (spec.layers, spec.kv_heads),
        "ffn": (spec.layers, spec.ffn_units),
        "hidden": (spec.hidden,),
        "attn_sublayers": (spec.layers,),
        "ffn_sublayers": (spec.layers,),
        "layers": (spec.layers,),
        "experts": (spec.layers, spec.experts),
    }[kind]


@dataclass(frozen=True)
class Gates:
    """Gate values in [0, 1] by kind; None where a kind is not gated (all ones). Shapes as in `unit_shape`.

    The gate of a layer acts on what its two sublayers add to the residual stream, biases included, so that a layer
    whose gate is 0 is the identity. Of its units it only says that they are gone with it.
    The gate of an expert acts on what the expert adds; one of 0 also takes its row from the router, which then chooses
    among the others.
    """

    heads: Tensor | None = None
    kv_groups: Tensor | None = None
    ffn: Tensor | None = None
    hidden: Tensor | None = None
    attn_sublayers: Tensor | None = None
    ffn_sublayers: Tensor | None = None
    layers: Tensor | None = None
    experts: Tensor | None = None

    def as_dict(self) -> dict[str, Tensor]:
        """The gated kinds."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def to(self, *args, **kwargs) -> Gates:
        """Every tensor moved or converted as by `Tensor.to`."""
        return Gates(**{kind: z.to(*args, **kwargs) for kind, z in self.as_dict().items()})

    def detach(self) -> Gates:
        """The same values without their graph."""
        return Gates(**{kind: z.detach() for kind, z in self.as_dict().items()})

    def opened(self) -> Gates:
        """Every gate that is not 0 at 1."""
        return Gates(**{kind: _open(z) for kind, z in self.as_dict().items()})

    @property
    def settled(self) -> bool:
        """Whether every gate is 0 or 1."""
        return all(torch.equal(z, _open(z)) for z in self.as_dict().values())

    def head_gate(self, spec: ArchSpec) -> Tensor | None:
        """[L, H]: product of a query head's own gate, its group's and its sublayer's, 0 in a removed layer.

        None if none of them is gated.
        """
        parts = []
        if self.heads is not None:
            parts.append(self.heads)
        if self.kv_groups is not None:
            parts.append(self.kv_groups.repeat_interleave(spec.group_size, dim=1))
        if self.attn_sublayers is not None:
            own = _open(self.attn_sublayers) if spec.norms_behind else self.attn_sublayers
            parts.append(own[:, None].expand(-1, spec.heads))
        if self.layers is not None:
            parts.append(_open(self.layers)[:, None].expand(-1, spec.heads))
        return _product(parts)

    def ffn_gate(self, spec: ArchSpec) -> Tensor | None:
        """[L, E·F]: product of a unit's gate, its expert's and its sublayer's, 0 in a removed layer.

        None if none of them is gated.
        """
        parts = [] if self.ffn is None else [self.ffn]
        if self.experts is not None:
            parts.append(self.experts.repeat_interleave(spec.ffn, dim=1))
        if self.ffn_sublayers is not None:
            own = _open(self.ffn_sublayers) if spec.norms_behind else self.ffn_sublayers
            parts.append(own[:, None].expand(-1, spec.ffn_units))
        if self.layers is not None:
            parts.append(_open(self.layers)[:, None].expand(-1, spec.ffn_units))
        return _product(parts)

    def added_gates(self, spec: ArchSpec) -> tuple[Tensor | None, Tensor | None]:
        """[L] and [L]: gates on what the attention and the FFN of a layer add to the stream; None where there is none.

        The layer's gate; with norms behind the sublayers also their own, of which `head_gate` and `ffn_gate` then only
        say which are gone.
        """
        own = (self.attn_sublayers, self.ffn_sublayers) if spec.norms_behind else (None, None)
        attention, ffn = (_product([gate for gate in (self.layers, sublayer) if gate is not None]) for sublayer in own)
        return attention, ffn

    def full(self, spec: ArchSpec) -> Gates:
        """The same gates with ones for every kind that is not gated."""
        present = self.as_dict()
        like = next(iter(present.values()), torch.ones(()))
        return Gates(**{k: present[k] if k in present else like.new_ones(unit_shape(spec, k)) for k in KINDS})


def kept_parameters(spec: ArchSpec, open_: Mapping[str, Tensor]) -> Tensor:
    """Expected number of kept prunable parameters when each unit is open independently.

    A group's K and V rows stay while the group is open and any of its query heads is. With probabilities this is an
    expectation, with 0/1 values the exact count of the exported model.

    Args:
        spec: the architecture.
        open_: probability (or 0/1) of each kind in `KINDS`, shapes [..., *`unit_shape`] of which the fronts broadcast.

    Returns:
        Tensor [...], differentiable in the probabilities.
    """
    hidden = open_["hidden"].sum(-1)
    attn, ffn = ((open_["layers"] * open_[kind])[..., None] for kind in ("attn_sublayers", "ffn_sublayers"))
    group = open_["kv_groups"]
    heads = open_["heads"].unflatten(-1, (spec.kv_heads, spec.group_size))
    any_head = 1 - (1 - heads).prod(-1)
    open_groups = attn * group
    kept_groups = (open_groups * any_head).sum((-2, -1))
    kept_heads = (open_groups[..., None] * heads).sum((-3, -2, -1))
    in_experts = open_["ffn"].unflatten(-1, (spec.experts, spec.ffn)).sum(-1)
    kept_ffn = (ffn * open_["experts"] * in_experts).sum((-2, -1))
    return (
        kept_heads * spec.head_cost(hidden) + kept_groups * spec.group_cost(hidden) + kept_ffn * spec.ffn_cost(hidden)
    )


def sparsity_of(spec: ArchSpec, gates: Gates) -> float:
    """Removed share of the prunable parameters when every unit with a nonzero gate is kept."""
    open_ = gates.detach().full(spec).opened().to(torch.float64).as_dict()
    return 1.0 - float(kept_parameters(spec, open_)) / spec.prunable


def _open(gate: Tensor) -> Tensor:
    return (gate != 0).to(gate.dtype)


def _product(parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return None
    out = parts[0]
    for part in parts[1:]:
        out = out * part
    return out
