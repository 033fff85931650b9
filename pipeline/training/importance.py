"""First-order Taylor importance of the gates (Molchanov et al. 2017, Michel et al. 2019), and log-alpha from it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import LossConfig
from nuteprune.masks import Gates, unit_shape
from nuteprune.model.layers import build_view
from nuteprune.model.pairing import PairedModel


def taylor_importance(model: PairedModel, kinds: list[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Sum over sequences of (∂L/∂z)² at z = 1, with L the intact model's language-model loss.

    The square is the diagonal of the empirical Fisher matrix, so half of it estimates what the loss rises by when the
    unit leaves (Molchanov et al. 2019, eq. 8); squares of single sequences estimate it better than those of batches.

    Args:
        model: the paired model (its LoRA is left out: the base alone is judged).
        kinds: gated kinds.
        batches: token ids [B, T].

    Returns:
        Importance by kind, float32, shapes as in `unit_shape`.
    """
    device = next(model.parameters()).device
    total = {k: torch.zeros(unit_shape(model.spec, k), device=device) for k in kinds}
    for ids in (sequence for batch in batches for sequence in batch.split(1)):
        gates = Gates(**{k: torch.ones_like(v).requires_grad_() for k, v in total.items()})
        view = build_view(model.spec, gates, {}, model.scaling, model.dtype)
        # A whole backward, not autograd.grad: it also passes the places where ZeRO-3 frees what it gathered.
        model(ids.to(device), view, None, LossConfig()).total.backward()
        for kind, gate in gates.as_dict().items():
            total[kind] += gate.grad.float().square()
    return total


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
