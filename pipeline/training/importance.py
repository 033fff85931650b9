"""First-order Taylor importance of the gates (Molchanov et al. 2017, Michel et al. 2019), and log-alpha from it.

Shape letters: B sequences, T tokens, U units at one place of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.arch import ArchSpec
from nuteprune.config import LossConfig
from nuteprune.masks import Gates, unit_shape
from nuteprune.model.layers import View, build_view
from nuteprune.model.pairing import PairedModel
from nuteprune.training.memory import is_out_of_memory


def taylor_importance(
    model: PairedModel, kinds: list[str], batches: Iterable[Tensor], at_once: int = 1
) -> dict[str, Tensor]:
    """Sum over sequences of (∂L/∂z)² at z = 1, with L the intact model's language-model loss.

    The square is the diagonal of the empirical Fisher matrix, so half of it estimates what the loss rises by when the
    unit leaves (Molchanov et al. 2019, eq. 8); squares of single sequences estimate it better than those of batches.

    Args:
        model: the paired model (its LoRA is left out: the base alone is judged).
        kinds: gated kinds.
        batches: token ids [B, T].
        at_once: sequences of a forward pass; fewer where memory runs out. One where experts mix their tokens.

    Returns:
        Importance by kind, float32, shapes as in `unit_shape`.
    """
    device = next(model.parameters()).device
    gates = {k: torch.ones(unit_shape(model.spec, k), device=device, requires_grad=True) for k in kinds}
    total = {k: torch.zeros_like(gate) for k, gate in gates.items()}
    view = build_view(model.spec, Gates(**gates), {}, model.scaling, model.dtype)
    places = [place for place in _places(model, view) if place[2].requires_grad]  # others only say what is gone
    at_once = 1 if model.spec.experts > 1 else at_once
    for batch in batches:
        left = batch.to(device)
        while len(left):
            try:
                found = _gradients(model, places, left[:at_once])
            except (RuntimeError, MemoryError) as error:
                if at_once == 1 or model.partitioning or not is_out_of_memory(error):
                    raise
                at_once = -(-min(at_once, len(left)) // 2)
                continue
            left = left[at_once:]
            for of_sequence in zip(*found, strict=True):
                back = torch.autograd.grad([gate for *_, gate in places], list(gates.values()), of_sequence,
                                           retain_graph=True)  # fmt: skip
                for kind, gradient in zip(kinds, back, strict=True):
                    total[kind] += gradient.square()
    return total


def _places(model: PairedModel, view: View) -> Iterator[tuple[nn.Module, bool, Tensor]]:
    """Where gates act: a module, whether on its input or its output, and the gate [U] or []."""
    for layer, own in zip(model.layers, view.layers, strict=True):
        seats = layer.layer.seats
        for name, state in own.states.items():
            sides = (True, state.in_gate), (False, state.out_gate)
            yield from ((seats.projections[name], before, gate) for before, gate in sides if gate is not None)
        norms = zip(seats.gated_norms, own.behind, strict=False)
        yield from ((norm, False, gate) for norm, gate in norms if gate is not None)
    if view.hidden is not None:
        yield model.layers[0], True, view.hidden


def _gradients(model: PairedModel, places: list[tuple[nn.Module, bool, Tensor]], ids: Tensor) -> list[Tensor]:
    """For each place ∂L/∂gate [B, U] or [B] of each sequence's own loss, in one forward and backward pass."""
    found = [gate.new_zeros(len(ids), *gate.shape) for *_, gate in places]
    plain = build_view(model.spec, None, {}, model.scaling, model.dtype)
    with ExitStack() as hooks:
        for (module, before, _), sums in zip(places, found, strict=True):
            hooks.enter_context(_watch(module, before, sums))
        loss = model(ids, plain, None, LossConfig()).total
        # A whole backward, not autograd.grad: it also passes the places where ZeRO-3 frees what it gathered.
        (loss * len(ids)).backward()
    return found


def _watch(module: nn.Module, before: bool, sums: Tensor) -> Any:
    """Add to `sums` in each backward pass through a module's input or output, until the handle is left."""
    if before:
        return module.register_forward_pre_hook(lambda _, inputs: (_Gate.apply(inputs[0], sums), *inputs[1:]))
    return module.register_forward_hook(lambda _, inputs, output: _Gate.apply(output, sums))


class _Gate(torch.autograd.Function):
    """x, as if gates of 1 multiplied it; their gradient Σ_t x⊙∂L/∂x of each sequence goes to `sums` [B, U] or [B]."""

    @staticmethod
    def forward(ctx, x: Tensor, sums: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sums = sums
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        found = (x * grad).reshape(len(ctx.sums), -1, x.shape[-1]).sum(1, dtype=torch.float32)
        ctx.sums += found if ctx.sums.dim() == 2 else found.sum(1)
        return grad, None


def initial_log_alpha(spec: ArchSpec, importance: dict[str, Tensor], spread: float) -> dict[str, Tensor]:
    """log-alpha whose order is that of importance per parameter over all kinds together.

    The ranks are mapped to a normal distribution of standard deviation `spread`, so the start does not depend on the
    scale of the loss.
    """
    costs = unit_costs(spec)
    density = torch.cat([(v.double() / costs[k]).flatten() for k, v in importance.items()])
    ranks = density.argsort(stable=True).argsort().double()
    normal = torch.special.ndtri((ranks + 0.5) / len(density)) * spread
    parts = normal.split([v.numel() for v in importance.values()])
    return {k: p.reshape(v.shape).float() for (k, v), p in zip(importance.items(), parts, strict=True)}


def unit_costs(spec: ArchSpec) -> dict[str, float]:
    """Parameters that leave with one unit of each kind, in the intact model."""
    d = spec.hidden
    head, group, ffn = spec.head_cost(d), spec.group_cost(d), spec.ffn_cost(d)
    with_group = spec.group_size == 1
    return {
        "heads": head + (group if with_group else 0),
        "kv_groups": group + spec.group_size * head,
        "ffn": ffn,
        "hidden": spec.prunable / d,
        "attn_sublayers": spec.heads * head + spec.kv_heads * group,
        "ffn_sublayers": spec.ffn_units * ffn,
        "layers": spec.prunable / spec.layers,
        "experts": spec.ffn * ffn,
    }
