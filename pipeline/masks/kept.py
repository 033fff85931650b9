"""The units that a set of gates keeps, as indices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.masks.gates import Gates


@dataclass(frozen=True)
class Kept:
    """Sorted indices of the units that stay; lists have one entry per layer of the base, `layers` are those that stay.

    A KV group stays exactly if one of its query heads has a nonzero effective gate. Units of all experts are numbered
    one after the other.
    """

    heads: list[Tensor]
    kv_groups: list[Tensor]
    ffn: list[Tensor]
    hidden: Tensor
    layers: Tensor
    experts: list[Tensor]

    def heads_per_group(self, spec: ArchSpec) -> list[list[int]]:
        """For each layer the number of kept query heads in each kept KV group."""
        counts = [torch.bincount(h // spec.group_size, minlength=spec.kv_heads) for h in self.heads]
        return [[n for n in layer.tolist() if n] for layer in counts]

    def ffn_of(self, spec: ArchSpec, layer: int, expert: int) -> Tensor:
        """The kept units of one expert, numbered from 0; without experts, of the layer."""
        units = self.ffn[layer]
        return units[units // spec.ffn == expert] - expert * spec.ffn

    def ffn_widths(self, spec: ArchSpec) -> list[list[int]]:
        """For each layer the number of kept units in each kept expert; without experts, of the layer."""
        counts = [torch.bincount(units // spec.ffn, minlength=spec.experts) for units in self.ffn]
        return [count[experts].tolist() for count, experts in zip(counts, self.experts, strict=True)]

    def is_uniform(self, spec: ArchSpec) -> bool:
        """Every layer that stays keeps the same counts, and something of both sublayers: a stock model can hold it."""
        heads, experts = ({len(units[i]) for i in self.layers} for units in (self.heads, self.experts))
        every_width = self.ffn_widths(spec)
        widths = {width for i in self.layers for width in every_width[i]}
        alike = self.attention_is_alike(spec) and len(heads) == len(widths) == len(experts) == 1
        return alike and 0 not in heads | widths and self.experts_are_alike(spec)

    def experts_are_alike(self, spec: ArchSpec) -> bool:
        """Each layer that stays has as many experts as its router chooses, of one width; sizes are aligned."""
        if spec.experts == 1:
            return True
        every_width = self.ffn_widths(spec)
        widths = [set(every_width[i]) for i in self.layers]
        sizes = ((len(self.hidden), spec.hidden), *((width, spec.ffn) for layer in widths for width in layer))
        aligned = all(size and (size % spec.aligned == 0 or size == whole) for size, whole in sizes)
        enough = all(len(self.experts[i]) >= spec.top_k for i in self.layers)
        return aligned and enough and all(len(layer) == 1 for layer in widths)

    def attention_is_alike(self, spec: ArchSpec) -> bool:
        """The layers that keep attention keep the same number of groups, each with the same number of query heads."""
        groups = [layer for layer in self.heads_per_group(spec) if layer]
        return len({len(layer) for layer in groups}) <= 1 and len({size for layer in groups for size in layer}) <= 1


def kept_units(spec: ArchSpec, gates: Gates) -> Kept:
    """The units with a nonzero effective gate."""
    full = gates.full(spec)
    head_gate, ffn_gate = full.head_gate(spec), full.ffn_gate(spec)
    assert head_gate is not None
    assert ffn_gate is not None
    assert full.hidden is not None
    assert full.layers is not None
    assert full.experts is not None
    heads = [row.nonzero().squeeze(1) for row in head_gate]
    groups = [torch.unique(h // spec.group_size) for h in heads]
    ffn = [row.nonzero().squeeze(1) for row in ffn_gate]
    experts = [row.nonzero().squeeze(1) for row in full.experts]
    return Kept(heads, groups, ffn, full.hidden.nonzero().squeeze(1), full.layers.nonzero().squeeze(1), experts)
