"""The units that a set of gates keeps, of which the model's view, an export, its record and reports are made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nuteprune.arch import ArchSpec
from nuteprune.masks.gates import Gates, unit_shape


@dataclass(frozen=True, eq=False)
class Kept:
    """Masks on the host, True for what stays: G query heads in each of K groups, F FFN units in each of E experts.

    A KV group stays exactly if one of its query heads does. No heads and units stay without their layer, their sublayer
    or their expert; experts are told whatever becomes of their layer. The names without letters list the same as sorted
    indices, by layer of the base: heads numbered over the layer, the units of its experts one after the other.

    Attributes:
        attention_L: layers with an attention, of which every head may be gone.
    """

    spec: ArchSpec
    heads_LKG: np.ndarray
    ffn_LEF: np.ndarray
    hidden_D: np.ndarray
    layers_L: np.ndarray
    attention_L: np.ndarray
    experts_LE: np.ndarray

    @classmethod
    def of(cls, spec: ArchSpec, gates: Gates | None = None) -> Kept:
        """The units whose gate is not 0; all where nothing is gated, or by gates without values (a dry run's).

        From one copy of all gates: a device is waited for once, whatever the depth.
        """
        gated = {} if gates is None else gates.detach().as_dict()
        found: dict[str, np.ndarray] = {}
        if gated and not any(isinstance(gate, FakeTensor) for gate in gated.values()):
            own = torch.cat([(gate != 0).flatten() for gate in gated.values()]).cpu()
            own = own.split([gate.numel() for gate in gated.values()])
            open_ = Gates(**{kind: z.view(unit_shape(spec, kind)) for kind, z in zip(gated, own, strict=True)})
            effective = open_.as_dict() | {"heads": open_.head_gate(spec), "ffn": open_.ffn_gate(spec)}
            masks = {kind: mask for kind, mask in effective.items() if mask is not None}
            flat = torch.cat([mask.flatten() for mask in masks.values()]).numpy()
            ends: np.ndarray = np.cumsum([mask.numel() for mask in masks.values()])[:-1]
            found = dict(zip(masks, np.split(flat, ends), strict=True))

        def mask(kind: str, *shape: int) -> np.ndarray:
            return found[kind].reshape(shape) if kind in found else np.ones(shape, bool)

        heads = mask("heads", spec.layers, spec.kv_heads, spec.group_size)
        ffn = mask("ffn", spec.layers, spec.experts, spec.ffn)
        layers, attention = mask("layers", spec.layers), mask("attn_sublayers", spec.layers)
        experts = mask("experts", spec.layers, spec.experts)
        return cls(spec, heads, ffn, mask("hidden", spec.hidden), layers, layers & attention, experts)

    @cached_property
    def heads(self) -> list[Tensor]:
        return [_indices(mask) for mask in self.heads_LKG]

    @cached_property
    def kv_groups(self) -> list[Tensor]:
        return [_indices(mask) for mask in np.any(self.heads_LKG, axis=2)]

    @cached_property
    def ffn(self) -> list[Tensor]:
        return [_indices(mask) for mask in self.ffn_LEF]

    @cached_property
    def hidden(self) -> Tensor:
        return _indices(self.hidden_D)

    @cached_property
    def layers(self) -> Tensor:
        return _indices(self.layers_L)

    @cached_property
    def experts(self) -> list[Tensor]:
        return [_indices(mask) for mask in self.experts_LE]

    def ffn_of(self, layer: int, expert: int) -> Tensor:
        """The kept units of one expert, numbered from 0; without experts, of the layer."""
        return _indices(self.ffn_LEF[layer, expert])

    @property
    def heads_per_group(self) -> list[list[int]]:
        """For each layer the number of kept query heads in each kept KV group."""
        return [[count for count in layer if count] for layer in self.heads_LKG.sum(2).tolist()]

    @property
    def ffn_widths(self) -> list[list[int]]:
        """For each layer the number of kept units in each kept expert; without experts, of the layer."""
        counts = self.ffn_LEF.sum(2)
        return [layer[experts].tolist() for layer, experts in zip(counts, self.experts_LE, strict=True)]

    @property
    def is_uniform(self) -> bool:
        """Every layer that stays keeps the same counts, and something of both sublayers: a stock model can hold it."""
        heads, experts = ({len(units[i]) for i in self.layers} for units in (self.heads, self.experts))
        every_width = self.ffn_widths
        widths = {width for i in self.layers for width in every_width[i]}
        alike = self.attention_is_alike and len(heads) == len(widths) == len(experts) == 1
        return alike and 0 not in heads | widths and self.experts_are_alike

    @property
    def experts_are_alike(self) -> bool:
        """Each layer that stays has as many experts as its router chooses, of one width; sizes are aligned."""
        spec = self.spec
        if spec.experts == 1:
            return True
        every_width = self.ffn_widths
        widths = [set(every_width[i]) for i in self.layers]
        sizes = ((len(self.hidden), spec.hidden), *((width, spec.ffn) for layer in widths for width in layer))
        aligned = all(size and (size % spec.aligned == 0 or size == whole) for size, whole in sizes)
        enough = all(len(self.experts[i]) >= spec.top_k for i in self.layers)
        return aligned and enough and all(len(layer) == 1 for layer in widths)

    @property
    def attention_is_alike(self) -> bool:
        """The layers that keep attention keep the same number of groups, each with the same number of query heads."""
        groups = [layer for layer in self.heads_per_group if layer]
        return len({len(layer) for layer in groups}) <= 1 and len({size for layer in groups for size in layer}) <= 1

    def changed(self, other: Kept) -> int:
        """Query heads, FFN units and hidden dimensions that stay in one of the two only."""
        pairs = ((self.heads_LKG, other.heads_LKG), (self.ffn_LEF, other.ffn_LEF), (self.hidden_D, other.hidden_D))
        return sum(int((own != theirs).sum()) for own, theirs in pairs)

    def record(self) -> dict[str, list]:
        """The lists of indices by kind, as nuteprune.json has them."""
        by_layer = {"heads": self.heads, "kv_groups": self.kv_groups, "ffn": self.ffn}
        by_layer |= {"experts": self.experts} if self.spec.experts > 1 else {}
        found: dict[str, list] = {kind: [units.tolist() for units in layers] for kind, layers in by_layer.items()}
        return found | {"hidden": self.hidden.tolist(), "layers": self.layers.tolist()}


def _indices(mask: np.ndarray) -> Tensor:
    """Sorted int64 indices of what is True, whatever the mask's shape."""
    return torch.from_numpy(np.flatnonzero(mask))
