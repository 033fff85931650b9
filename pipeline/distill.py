"""Distillation losses as pure functions: the layer term, and the output term in chunks of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Label of a token that is not learned."""
_EPS = 1e-8


def layer_loss(student: Tensor, teacher: Tensor, hidden_gate: Tensor | None, kind: str) -> Tensor:
    """Distance of two residual streams after one layer, a float32 scalar.

    raw: mean squared error over tokens and kept hidden dimensions (the paper's eq. 8).
    normalized: the same per token, divided by the larger of the teacher's and the student's mean square at that token,
    so that a few tokens with massive activations, right or wrong, do not rule the sum (each counts at most 4).

    Args:
        student, teacher: [B, T, D].
        hidden_gate: [D] of the student, or None; removed dimensions do not count.
        kind: "raw" or "normalized".
    """
    reference = teacher.float()
    difference = student.float() - reference
    count = difference.shape[-1]
    if hidden_gate is not None:
        kept = (hidden_gate.detach() != 0).float()
        difference, reference = difference * kept, reference * kept
        count = kept.sum().clamp(min=1)
    squared = difference.square().sum(-1) / count
    if kind == "normalized":
        own = (difference.detach() + reference).square().sum(-1)
        squared = squared / (torch.maximum(reference.square().sum(-1), own) / count + _EPS)
    return squared.mean()


class _ChunkedHeadLoss(torch.autograd.Function):
    """Loss on full-vocabulary logits of which only `chunk` tokens' worth exists at a time.

    The head is frozen, so the gradient of the hidden states is computed chunk by chunk in the forward pass and scaled
    in the backward pass; no logits are kept and none are computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, chunk):
        keep_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if keep_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        tokens = hidden.shape[0]
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight).float()
            if target.dtype == torch.long:
                loss, slope = _cross_entropy(logits, target[rows])
            else:
                loss, slope = _kl(logits, F.linear(target[rows], weight).float(), temperature)
            total += loss
            if keep_gradient:
                gradient[rows] = slope.to(weight.dtype).mm(weight)
        ctx.save_for_backward(gradient)
        ctx.tokens = tokens
        return total / tokens

    @staticmethod
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_output / ctx.tokens).to(gradient.dtype), None, None, None, None


def head_kl(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float, chunk: int) -> Tensor:
    """T²·KL(teacher‖student) per token over the full vocabulary, a float32 scalar.

    Args:
        student, teacher: final hidden states [N, D]; the gradient goes to the student.
        weight: output head [V, D], frozen.
        temperature: T.
        chunk: tokens whose logits exist at once.
    """
    return _ChunkedHeadLoss.apply(student, weight, teacher, temperature, chunk)


def head_cross_entropy(student: Tensor, labels: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Cross entropy per token over the full vocabulary; student [N, D], labels [N], weight [V, D]."""
    return _ChunkedHeadLoss.apply(student, weight, labels, 1.0, chunk)


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sum over rows of T²·KL and its gradient T·(q − p) in the student's logits."""
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    p = log_p.exp()
    loss = temperature**2 * (p * (log_p - log_q)).sum()
    return loss, (log_q.exp() - p) * temperature


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of −log q[label] and its gradient q − onehot."""
    log_q = F.log_softmax(logits, dim=-1)
    loss = -log_q.gather(1, labels[:, None]).sum()
    slope = log_q.exp()
    slope[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return loss, slope
