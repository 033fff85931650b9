"""The views that say which gates and LoRA are in force, and how a decoder layer takes them up.

A `View` is one student or teacher: for each decoder layer the gates, kept indices and LoRA weights of its projections.
Activating a view sets a few attributes; it copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.arch import ATTENTION, FFN, ArchSpec, projections
from nuteprune.config import LoraConfig
from nuteprune.masks import Gates, Kept
from nuteprune.model.index_lists import LayerLists, index_lists
from nuteprune.model.projection import MaskedLoRALinear, ProjectionState
from nuteprune.model.wrappers import GatedNorm, GatedRouter, WidthNorm

LoraWeights = Mapping[str, tuple[Tensor, Tensor]]
"""LoRA pairs (A [R, K], B [N, R]) by "layer.projection", e.g. "3.q_proj"."""
LoraParameters = dict[str, tuple[nn.Parameter, nn.Parameter]]
"""The pairs in training."""


@dataclass(frozen=True)
class LayerView:
    """One decoder layer of a view.

    Attributes:
        states: by projection name.
        kept: what it keeps.
        behind: gates behind the norms that follow attention and FFN, where there are such norms.
    """

    states: dict[str, ProjectionState]
    kept: LayerLists
    behind: tuple[Tensor | None, Tensor | None] = (None, None)


@dataclass(frozen=True)
class View:
    """A student or a teacher over the shared base weights.

    Attributes:
        layers: one `LayerView` per decoder layer.
        hidden: [D] gate of the residual stream, or None.
    """

    layers: list[LayerView]
    hidden: Tensor | None = None


_WIDTH_NORMS = {"q_norm": "q_proj", "k_norm": "k_proj"}


def install(layers: nn.ModuleList, spec: ArchSpec) -> None:
    """Replace the projections of every decoder layer by `MaskedLoRALinear`, in place, and its router and norms."""
    for layer in layers:
        for owner, attribute in projections(layer).values():
            setattr(owner, attribute, MaskedLoRALinear(getattr(owner, attribute)))
        if spec.experts > 1:
            layer.mlp.gate = GatedRouter(layer.mlp.gate)
        for name in spec.norms_behind:
            setattr(layer, name, GatedNorm(getattr(layer, name)))
        if spec.qk_norm == "width":
            attention = layer.self_attn
            for norm, name in _WIDTH_NORMS.items():
                setattr(attention, norm, WidthNorm(getattr(attention, norm), getattr(attention, name).out_features))
        layer.seats = seats = _seats(layer)
        query, *others = (seats.projections[name] for name in ATTENTION[:3])
        query.beside = tuple(others)


@dataclass(frozen=True)
class _Seats:
    """Where a decoder layer takes up a view: its projections by name, its router, and the norms that know of gates.

    Attributes:
        attention: attributes of the attention module.
    """

    attention: dict[str, Any]
    projections: dict[str, MaskedLoRALinear]
    router: GatedRouter | None
    width_norms: list[tuple[WidthNorm, str]]
    gated_norms: list[GatedNorm]


def _seats(layer: nn.Module) -> _Seats:
    width_norms = [(getattr(layer.self_attn, norm, None), name) for norm, name in _WIDTH_NORMS.items()]
    router = getattr(layer.mlp, "gate", None)
    return _Seats(
        vars(layer.self_attn),
        {name: getattr(owner, attribute) for name, (owner, attribute) in projections(layer).items()},
        router if isinstance(router, GatedRouter) else None,
        [(norm, name) for norm, name in width_norms if isinstance(norm, WidthNorm)],
        [module for module in layer.children() if isinstance(module, GatedNorm)],
    )


def at_hand(module: nn.Module) -> None:
    """Let a module find its submodules as plain attributes: `nn.Module.__getattr__` takes 20 times as long."""
    vars(module).update(module._modules)


def fresh_lora(layers: Iterable[nn.Module], config: LoraConfig, device: torch.device) -> LoraParameters:
    """LoRA pairs by "layer.projection", float32: A random as in peft, B zero.

    Drawn on the host: what a GPU draws from a seed depends on the number of its processors, and ranks may differ in it.
    """
    lora = {}
    for index, layer in enumerate(layers):
        for name, (owner, attribute) in projections(layer).items():
            if name in config.targets:
                module = getattr(owner, attribute)
                a = torch.empty(config.rank, module.in_features, dtype=torch.float32, device="cpu")
                b = torch.zeros(module.out_features, config.rank, dtype=torch.float32, device=device)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                lora[f"{index}.{name}"] = (nn.Parameter(a.to(device)), nn.Parameter(b))
    return lora


def activate(layer: nn.Module, view: LayerView) -> None:
    """Make a decoder layer compute as `view` from now on: attribute swaps only."""
    seats: _Seats = layer.seats
    states = view.states
    for name, module in seats.projections.items():
        module.__dict__["state"] = states[name]
    if seats.router is not None:
        seats.router.keep = view.kept.routes
    attention = seats.attention
    attention["num_key_value_groups"], attention["kv_index"] = view.kept.group_size, view.kept.kv_index
    for norm, name in seats.width_norms:
        norm.keep = view.states[name].keep_out
    for norm, gate in zip(seats.gated_norms, view.behind, strict=False):
        norm.gate = gate


def build_view(
    spec: ArchSpec, gates: Gates | None, lora: LoraWeights, scaling: float, dtype: torch.dtype,
    skip_removed: bool = True, whole: LoraWeights | None = None,
) -> View:  # fmt: skip
    """The view of given gates and LoRA weights.

    Args:
        spec: the architecture.
        gates: gate values (None: intact), on the model's device.
        lora: LoRA pairs by "layer.projection"; those that are not in training are cast to `dtype` here, once.
        scaling: alpha / rank.
        dtype: compute type.
        whole: pairs in `dtype` to compute with, of which those of `lora` are the last ranks.
        skip_removed: leave units whose gate is exactly 0 out of the computation; False multiplies them by 0.
    """
    gates = gates or Gates()
    heads, ffn, hidden = gates.head_gate(spec), gates.ffn_gate(spec), gates.hidden
    kept = Kept.of(spec, gates)
    if not skip_removed:  # a removed expert is no choice of the router's, however the others are computed
        kept = replace(Kept.of(spec), experts_LE=kept.experts_LE)
    device = next((gate.device for gate in gates.as_dict().values()), torch.device("cpu"))
    lists, stream = index_lists(kept, device)
    into_norm = [{}] * spec.layers if skip_removed else _into_norm(spec, heads)
    added = gates.added_gates(spec)
    scales = list(zip(*(_layer_scales(spec, gate, skip_removed) for gate in added), strict=True))
    none = [None] * spec.layers
    # All layers at once: an operation a layer, and one more in its backward, is what a small layer's step is made of.
    head_gates = none if heads is None else heads.repeat_interleave(spec.head_dim, dim=1).unbind(0)
    ffn_gates = [None] * spec.layers * spec.experts if ffn is None else ffn.reshape(-1, spec.ffn).unbind(0)
    residual = _Side(hidden, stream)
    layers = []
    for index, own in enumerate(lists):
        # LoRA in training stays as it is: the kernels take it in its own type, and its gradient arrives in that.
        pairs = {n: tuple(t if t.requires_grad else t.to(dtype) for t in lora[f"{index}.{n}"])
                 for n in (*ATTENTION, *FFN) if f"{index}.{n}" in lora}  # fmt: skip
        queries, values = _Side(head_gates[index], own.queries), _Side(None, own.values)
        of_experts = ffn_gates[index * spec.experts : (index + 1) * spec.experts]
        units = [_Side(gate, keep) for gate, keep in zip(of_experts, own.ffn, strict=True)]
        states = _states(spec, queries, values, units, residual, scales[index], into_norm[index], pairs, scaling)
        for name in FFN:
            if whole and f"{index}.{name}" in whole:
                states[name] = replace(states[name], whole=whole[f"{index}.{name}"])
        behind = scales[index] if spec.norms_behind else (None, None)
        layers.append(LayerView(states, own, behind))
    return View(layers, hidden)


@dataclass(frozen=True)
class _Side:
    """The gate and the kept indices of one side of a projection."""

    gate: Tensor | None = None
    keep: Tensor | None = None


def _layer_scales(spec: ArchSpec, gate: Tensor | None, skip_removed: bool) -> list[Tensor | None]:
    """For each layer the gate of what it adds to the stream; None where that stays as it is."""
    if gate is None:
        return [None] * spec.layers
    if gate.requires_grad or not skip_removed:
        return list(gate)
    return [None if value == 1 else z for value, z in zip(gate.tolist(), gate, strict=True)]


def _into_norm(spec: ArchSpec, heads: Tensor | None) -> list[dict[str, Tensor]]:
    """By layer and projection, what multiplies the rows of removed heads where they are not left out.

    A removed head leaves the norm that its queries and keys share with the others: no rows, or zeros.
    """
    if spec.qk_norm != "width" or heads is None:
        return [{}] * spec.layers
    alive = (heads.detach() != 0).to(heads.dtype)
    groups = alive.unflatten(1, (-1, spec.group_size)).amax(2)
    queries, keys = (unit.repeat_interleave(spec.head_dim, dim=1) for unit in (alive, groups))
    return [{"q_proj": q, "k_proj": k} for q, k in zip(queries, keys, strict=True)]


def _states(
    spec: ArchSpec, queries: _Side, values: _Side, units: list[_Side], residual: _Side,
    scales: tuple[Tensor | None, Tensor | None], into_norm: Mapping[str, Tensor],
    pairs: Mapping[str, tuple[Tensor, Tensor]], scaling: float,
) -> dict[str, ProjectionState]:  # fmt: skip
    """What each projection of a layer computes with; `units` are those of each expert."""
    ffns = [""] if spec.experts == 1 else [f"experts.{number}." for number in range(spec.experts)]
    outputs = {"q_proj": queries, "k_proj": values, "v_proj": values}
    outputs |= {f"{ffn}{name}": own for ffn, own in zip(ffns, units, strict=True) for name in ("gate_proj", "up_proj")}
    inputs = [("o_proj", queries, scales[0])]
    inputs += [(f"{ffn}down_proj", own, scales[1]) for ffn, own in zip(ffns, units, strict=True)]
    states = {}
    for name, side in outputs.items():
        # The residual stream is already masked, so removed hidden dimensions arrive as zeros: no gate, only the skip.
        states[name] = ProjectionState(pairs.get(name), scaling, None, into_norm.get(name), residual.keep, side.keep,
                                       compact_out=side.keep is not None)  # fmt: skip
    for name, side, scale in inputs:
        added = residual.gate
        if scale is not None and not spec.norms_behind:
            added = scale.repeat(spec.hidden) if added is None else scale * added
        states[name] = ProjectionState(pairs.get(name), scaling, side.gate, added, side.keep, residual.keep,
                                       compact_in=side.keep is not None)  # fmt: skip
    return states
