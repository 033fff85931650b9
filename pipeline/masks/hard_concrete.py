"""The hard-concrete distribution (Louizos et al. 2018, arXiv 1712.01312): pure functions of log-alpha.

A gate is z = clamp(s·(ζ−γ)+γ, 0, 1) with s = σ((ν·logit(u) + log α)/β), u ~ U(0, 1), stretch γ = −0.1, ζ = 1.1. The
noise scale ν is 1 as published; ν → 0 makes the gate deterministic, and the closed form below holds for every ν.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAMMA, ZETA = -0.1, 1.1
_EPS = 1e-6


def sample(log_alpha: Tensor, uniform: Tensor, temperature: float, noise: float = 1.0) -> Tensor:
    """Sampled gates in [0, 1], of log_alpha's shape; differentiable in log_alpha.

    Args:
        log_alpha: location parameters, any shape.
        uniform: U(0, 1) numbers of the same shape.
        temperature: β.
        noise: ν, 0 for none.
    """
    logit = torch.logit(uniform, eps=_EPS)
    s = torch.sigmoid((noise * logit + log_alpha) / temperature)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def mean_open(log_alpha: Tensor, temperature: float, noise: float = 1.0, points: int = 16) -> Tensor:
    """E[z | z > 0], of log_alpha's shape, by the midpoint rule over the open part of u."""
    p = probability_open(log_alpha, temperature, noise)
    total = torch.zeros_like(log_alpha)
    for k in range(points):
        total += sample(log_alpha, 1 - p * (k + 0.5) / points, temperature, noise)
    return total / points


def probability_open(log_alpha: Tensor, temperature: float, noise: float = 1.0) -> Tensor:
    """P(z > 0), of log_alpha's shape: σ((log α − β·log(−γ/ζ))/ν) (eq. 12 with noise scale ν)."""
    shifted = log_alpha - temperature * math.log(-GAMMA / ZETA)
    return torch.sigmoid(shifted / max(noise, 1e-4))
