"""Gradients of LoRA factors scaled by each other, so that all directions of the product BA are learned alike.

With W + s·BA the gradient of A carries B and that of B carries A: directions in which the other factor is small are
hardly learned, and AdamW, which scales each entry by itself, does not mend that. The scaled gradients
(BᵀB + δI)⁻¹ ∇A and ∇B (AAᵀ + δI)⁻¹ are those of a Riemannian metric under which a step of BA does not depend on how the
product is split (Zhang & Pilanci 2024, arXiv 2402.02347).

Shape letters: n pairs alike, N outputs, K inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

DAMPING = 1e-4
"""δ. Entries of A start with variance 1/(3K), so AAᵀ is near I/3; B starts at 0 and BᵀB has passed δ after a step."""

B_RATE = 4.0
"""Learning rate of B as a multiple of that of A (Hayou et al. 2024, LoRA+, arXiv 2402.12354)."""

Pair = tuple[Tensor, Tensor]


class Preconditioner:
    """Scales the gradients of pairs A [R, K], B [N, R] in place; pairs of one shape together, without a host sync."""

    def __init__(self, pairs: Iterable[Pair]):
        def shapes(pair: Pair) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(factor.shape) for factor in pair)

        self.groups = [list(zip(*group, strict=True)) for _, group in groupby(sorted(pairs, key=shapes), shapes)]

    @torch.no_grad()
    def __call__(self) -> None:
        """Scale what `.grad` of each factor holds."""
        for first, second in self.groups:
            a_nRK, b_nNR = torch.stack(first), torch.stack(second)
            grad_a, grad_b = [p.grad for p in first], [p.grad for p in second]
            _copy(grad_a, _inverse_gram(b_nNR) @ torch.stack(grad_a))
            _copy(grad_b, torch.stack(grad_b) @ _inverse_gram(a_nRK.mT))


def _inverse_gram(factor: Tensor) -> Tensor:
    """(FᵀF + δI)⁻¹ of F [n, D, R]: in float64, as FᵀF is a thousand times δ where the training has gone far.

    `inv` itself would wait for the device to say whether a matrix is singular.
    """
    double = factor.double()
    damping = DAMPING * torch.eye(factor.shape[-1], dtype=torch.float64, device=factor.device)
    return torch.linalg.inv_ex(double.mT @ double + damping).inverse.to(factor.dtype)


def _copy(targets: list[Tensor], values: Tensor) -> None:
    torch._foreach_copy_(targets, list(values.unbind()))
