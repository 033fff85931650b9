"""Norms and routers of transformers with what they must know of removed units."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class WidthNorm(nn.Module):
    """RMSNorm over the whole width of queries or keys (OLMo 2), of which only the kept rows may arrive.

    Removed rows count as zeros: y = w·x / sqrt(Σx²/N + eps) with N the intact width.

    Args:
        base: the norm it replaces; its weight is shared.
        width: N.
    """

    def __init__(self, base: nn.Module, width: int):
        super().__init__()
        self.weight, self.variance_epsilon, self.width = base.weight, base.variance_epsilon, width
        self.keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N] or its kept columns, normalised."""
        weight = self.weight if self.keep is None else self.weight[self.keep]
        mean_square = x.float().pow(2).mean(-1, keepdim=True) * (x.shape[-1] / self.width)
        return (weight * (x.float() * torch.rsqrt(mean_square + self.variance_epsilon))).to(x.dtype)


class GatedNorm(nn.Module):
    """A norm behind a sublayer, and the gate of all that the sublayer adds, which would be lost before the norm."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm
        self.gate: Tensor | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The norm's own."""
        return self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D], normalised and gated."""
        y = self.norm(x)
        return y if self.gate is None else y * self.gate.to(y.dtype)


class GatedRouter(nn.Module):
    """A router that lacks the rows of removed experts, and so chooses among the others.

    Args:
        router: transformers' own.
    """

    def __init__(self, router: nn.Module):
        super().__init__()
        self.router = router
        self.keep: Tensor | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The router's own."""
        return self.router.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] to logits, and weights and numbers of the chosen experts [N, k]."""
        if self.keep is None:
            return self.router(x)
        few = copy.copy(self.router)
        few._parameters = {"weight": self.weight[self.keep]}
        logits, weights, index = few(x)
        return logits, weights, self.keep[index]
