"""A frozen linear layer with gates and LoRA around it, and the views that say which gates and LoRA are in force.

A `View` is one student or teacher: for each decoder layer the gates, kept indices and LoRA weights of its projections.
Activating a view sets a few attributes; it copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from nuteprune.arch import ATTENTION, FFN, ArchSpec, projections
from nuteprune.config import LoraConfig
from nuteprune.kernels.api import known_lists
from nuteprune.masks import Gates
from nuteprune.model import structure

LoraWeights = Mapping[str, tuple[Tensor, Tensor]]
"""LoRA pairs (A [R, K], B [N, R]) by "layer.projection", e.g. "3.q_proj"."""
LoraParameters = dict[str, tuple[nn.Parameter, nn.Parameter]]
"""The pairs in training."""


@dataclass(frozen=True)
class ProjectionState:
    """What one projection computes with.

    Gates are full-size; `keep_*` are sorted indices of the units that are not removed, None for all. A compact side
    carries only the kept units: the rows of kept heads out of q, k and v, the kept FFN units between up and down.
    """

    lora: tuple[Tensor, Tensor] | None = None
    scaling: float = 1.0
    in_gate: Tensor | None = None
    out_gate: Tensor | None = None
    keep_in: Tensor | None = None
    keep_out: Tensor | None = None
    compact_in: bool = False
    compact_out: bool = False

    @cached_property
    def operands(self) -> tuple:
        """The arguments of `kernels.api.known_lists` behind x, the weight and its bias."""
        gates, lists = (self.in_gate, self.out_gate), (self.keep_in, self.keep_out)
        return *(self.lora or (None, None)), *gates, *lists, self.scaling, self.compact_in, self.compact_out


@dataclass(frozen=True)
class LayerView:
    """One decoder layer of a view: its projections, and how kept query heads map to kept KV groups.

    Attributes:
        states: by projection name.
        group_size: query heads per group where that is the same for all kept groups, else 1.
        kv_index: [kept heads] group of each kept head where groups are ragged, else None.
        removed: nothing of the layer is left.
    """

    states: dict[str, ProjectionState]
    group_size: int
    kv_index: Tensor | None = None
    removed: bool = False


@dataclass(frozen=True)
class View:
    """A student or a teacher over the shared base weights.

    Attributes:
        layers: one `LayerView` per decoder layer.
        hidden: [D] gate of the residual stream, or None.
    """

    layers: list[LayerView]
    hidden: Tensor | None = None


class MaskedLoRALinear(nn.Module):
    """y = ((x⊙m_in)Wᵀ + s((x⊙m_in)Aᵀ)Bᵀ + b)⊙m_out with W and b frozen; m, A, B come from the active view.

    The module holds frozen weights only. The student's LoRA lives outside of it (`fresh_lora`), so that ZeRO-3
    partitions the base and leaves LoRA whole on every rank.

    Args:
        base: the `nn.Linear` it replaces; its parameters are shared, not copied.
    """

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.state = ProjectionState()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] (or its kept columns) to [..., N] (or the kept rows)."""
        return known_lists(x, self.weight, self.bias, *self.state.operands)


def install(layers: nn.ModuleList) -> None:
    """Replace the seven projections of every decoder layer by `MaskedLoRALinear`, in place."""
    for layer in layers:
        for owner, attribute in projections(layer).values():
            setattr(owner, attribute, MaskedLoRALinear(getattr(owner, attribute)))


def fresh_lora(layers: Iterable[nn.Module], config: LoraConfig, device: torch.device) -> LoraParameters:
    """LoRA pairs to train, by "layer.projection": A random as in peft, B zero, both float32."""
    lora = {}
    for index, layer in enumerate(layers):
        for name, (owner, attribute) in projections(layer).items():
            if name in config.targets:
                module = getattr(owner, attribute)
                a = torch.empty(config.rank, module.in_features, dtype=torch.float32, device=device)
                b = torch.zeros(module.out_features, config.rank, dtype=torch.float32, device=device)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                lora[f"{index}.{name}"] = (nn.Parameter(a), nn.Parameter(b))
    return lora


def activate(layer: nn.Module, view: LayerView) -> None:
    """Make a decoder layer compute as `view` from now on: attribute swaps only."""
    for name, (owner, attribute) in projections(layer).items():
        getattr(owner, attribute).state = view.states[name]
    layer.self_attn.num_key_value_groups = view.group_size
    layer.self_attn.kv_index = view.kv_index


def build_view(
    spec: ArchSpec, gates: Gates | None, lora: LoraWeights, scaling: float, dtype: torch.dtype,
    skip_removed: bool = True,
) -> View:  # fmt: skip
    """The view of given gates and LoRA weights.

    Args:
        spec: the architecture.
        gates: gate values (None: intact), on the model's device.
        lora: LoRA pairs by "layer.projection"; those that are not in training are cast to `dtype` here, once.
        scaling: alpha / rank.
        dtype: compute type.
        skip_removed: leave units whose gate is exactly 0 out of the computation; False multiplies them by 0.
    """
    heads = ffn = hidden = None
    if gates is not None:
        full = gates.full(spec) if gates.ffn is None and gates.ffn_sublayers is not None else gates
        heads, ffn, hidden = gates.head_gate(spec), full.ffn_gate(), gates.hidden
    found = structure.find(spec, heads, ffn, hidden) if skip_removed else structure.dense(spec)
    none = [None] * spec.layers
    # All layers at once: an operation a layer, and one more in its backward, is what a small layer's step is made of.
    head_gates = none if heads is None else heads.repeat_interleave(spec.head_dim, dim=1).unbind(0)
    ffn_gates = none if ffn is None else ffn.unbind(0)
    residual = _Side(hidden, found.hidden)
    layers = []
    for index, (kept, head_gate, ffn_gate) in enumerate(zip(found.layers, head_gates, ffn_gates, strict=True)):
        # LoRA in training stays as it is: the kernels take it in its own type, and its gradient arrives in that.
        pairs = {n: tuple(t if t.requires_grad else t.to(dtype) for t in lora[f"{index}.{n}"])
                 for n in (*ATTENTION, *FFN) if f"{index}.{n}" in lora}  # fmt: skip
        states = _states(_Side(head_gate, kept.queries), _Side(None, kept.values), _Side(ffn_gate, kept.ffn), residual,
                         pairs, scaling)  # fmt: skip
        layers.append(LayerView(states, kept.group_size, kept.kv_index, kept.removed))
    return View(layers, hidden)


@dataclass(frozen=True)
class _Side:
    """The gate and the kept indices of one side of a projection."""

    gate: Tensor | None = None
    keep: Tensor | None = None


def _states(
    queries: _Side, values: _Side, units: _Side, residual: _Side, pairs: LoraWeights, scaling: float
) -> dict[str, ProjectionState]:
    """What each projection of a layer computes with."""
    outputs = {"q_proj": queries, "k_proj": values, "v_proj": values, "gate_proj": units, "up_proj": units}
    states = {}
    for name, side in outputs.items():
        # The residual stream is already masked, so removed hidden dimensions arrive as zeros: no gate, only the skip.
        states[name] = ProjectionState(pairs.get(name), scaling, keep_in=residual.keep, keep_out=side.keep,
                                       compact_out=side.keep is not None)  # fmt: skip
    for name, side in {"o_proj": queries, "down_proj": units}.items():
        states[name] = ProjectionState(pairs.get(name), scaling, side.gate, residual.gate, side.keep, residual.keep,
                                       compact_in=side.keep is not None)  # fmt: skip
    return states
