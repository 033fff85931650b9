"""First-order Taylor importance of the gates (Molchanov et al. 2017, Michel et al. 2019), and log-alpha from it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.arch import ArchSpec
from pipeline.config import LossConfig
from pipeline.layers import LoraWeights, build_view
from pipeline.masks import Gates, unit_shape
from pipeline.pairing import PairedModel


def taylor_importance(
    model: PairedModel, kinds: list[str], batches: Iterable[Tensor], gates: Gates | None = None,
    lora: LoraWeights | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Sum over sequences of (z·∂L/∂z)², with L the language-model loss of the model with the given gates and LoRA.

    The square is the diagonal of the empirical Fisher matrix, so half of it estimates what the loss rises by when the
    unit leaves (Molchanov et al. 2019, eq. 8); squares of single sequences estimate it better than those of batches.

    Args:
        model: the paired model.
        kinds: gated kinds.
        batches: token ids [B, T].
        gates: where to measure; None: all open.
        lora: LoRA pairs; None: the base alone.

    Returns:
        Importance by kind, float32, shapes as in `unit_shape`; 0 for units that are closed.
    """
    device = next(model.parameters()).device
    point = {k: torch.ones(unit_shape(model.spec, k), device=device) for k in kinds} | (
        gates.as_dict() if gates else {}
    )
    total = {k: torch.zeros_like(z) for k, z in point.items()}
    for ids in (sequence for batch in batches for sequence in batch.split(1)):
        leaf = Gates(**{k: z.detach().clone().requires_grad_() for k, z in point.items()})
        view = build_view(model.spec, leaf, lora or {}, model.scaling, model.dtype)
        loss = model(ids.to(device), view, None, LossConfig()).total
        gradients = torch.autograd.grad(loss, list(leaf.as_dict().values()), materialize_grads=True)
        for kind, gradient in zip(leaf.as_dict(), gradients, strict=True):
            total[kind] += (gradient.float() * point[kind]).square()
    return total


def initial_log_alpha(
    spec: ArchSpec, importance: dict[str, Tensor], spread: float, closed: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """log-alpha whose order is that of importance per parameter over all kinds together.

    The ranks are mapped to a normal distribution of standard deviation `spread`, so the start does not depend on the
    scale of the loss.

    Args:
        spec: the architecture.
        importance: by kind, as in `unit_shape`.
        spread: standard deviation.
        closed: log-alpha of an earlier ranking: units of importance 0 rank below all others, in its order.
    """
    costs = unit_costs(spec)
    density = torch.cat([(v.double() / costs[k]).flatten() for k, v in importance.items()])
    if closed is not None:
        before = torch.cat([closed[k].double().flatten() for k in importance])
        density = torch.where(density > 0, density, before - before.max() - 1)
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
        "ffn_sublayers": spec.ffn * ffn,
    }
