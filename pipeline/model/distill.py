"""Distillation losses as pure functions: the layer term, and the output term in chunks of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nuteprune.kernels.api import rowwise_kernels

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


def layer_terms(student: Tensor, teacher: Tensor, hidden_gate: Tensor | None, kind: str) -> Tensor:
    """`layer_loss`; where triton runs, its terms by token [B·T], float32, of which it is the mean."""
    kernels = rowwise_kernels(student, teacher)
    if kernels is None:
        return layer_loss(student, teacher, hidden_gate, kind)
    return kernels.layer_distances(student, teacher, hidden_gate, kind == "normalized")


class HeadLosses(NamedTuple):
    """Output terms per token, float32 scalars: their weighted sum (with gradient), the KL and the cross entropy."""

    total: Tensor
    kl: Tensor
    cross_entropy: Tensor


class _ChunkedHeadLoss(torch.autograd.Function):
    """Losses on full-vocabulary logits of which only `chunk` tokens' worth exists at a time.

    The head is frozen, so the gradient of the hidden states is computed chunk by chunk in the forward pass and scaled
    in the backward pass; no logits are kept and none are computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, teacher, labels, kl_weight, label_weight, temperature, chunk):
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        kl, entropy = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        tokens = hidden.shape[0]
        learned = None if labels is None else (labels != IGNORE).sum().clamp(min=1)  # on the device: nothing waits
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight).float()
            slope = None
            if labels is not None:
                loss, slope = _cross_entropy_(logits if teacher is None else logits.clone(), labels[rows])
                entropy += loss / learned
                slope *= label_weight * tokens / learned
            if teacher is not None:
                loss, own = _kl_(logits, F.linear(teacher[rows], weight).float(), temperature)
                kl += loss / tokens
                own *= kl_weight
                slope = own if slope is None else slope.add_(own)
            if gradient is not None:
                assert slope is not None  # there are labels or a teacher
                gradient[rows] = slope.to(weight.dtype).mm(weight)
        ctx.save_for_backward(gradient)
        ctx.tokens = tokens
        ctx.mark_non_differentiable(kl, entropy)
        return kl_weight * kl + label_weight * entropy, kl, entropy

    @staticmethod
    def backward(ctx, grad_output, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_output / ctx.tokens).to(gradient.dtype), *[None] * 7


def head_loss(
    student: Tensor, weight: Tensor, chunk: int, teacher: Tensor | None = None, labels: Tensor | None = None,
    kl_weight: float = 1.0, label_weight: float = 1.0, temperature: float = 1.0,
) -> HeadLosses:  # fmt: skip
    """kl_weight · T²·KL(teacher‖student) + label_weight · cross entropy, per token over the full vocabulary.

    Args:
        student: final hidden states [N, D]; the gradient goes to them.
        weight: output head [V, D], frozen.
        chunk: tokens whose logits exist at once.
        teacher: final hidden states [N, D], or None for no KL.
        labels: token ids [N], or None for no cross entropy; `IGNORE` where there is nothing to learn.
        temperature: T.
    """
    return HeadLosses(
        *_ChunkedHeadLoss.apply(student, weight, teacher, labels, kl_weight, label_weight, temperature, chunk)
    )


def _kl_(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sum over rows of T²·KL and its gradient T·(q − p) in the student's logits; both logits are overwritten."""
    log_q, log_p = (_log_softmax_(logits.div_(temperature)) for logits in (student, teacher))
    p = log_p.exp()
    loss = temperature**2 * log_p.sub_(log_q).mul_(p).sum()
    return loss, log_q.exp_().sub_(p).mul_(temperature)


def _cross_entropy_(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over learned rows of −log q[label] and its gradient q − onehot; the logits are overwritten."""
    learned = labels != IGNORE
    labels = labels.where(learned, 0)
    log_q = _log_softmax_(logits)
    loss = -(log_q.gather(1, labels[:, None]).squeeze(1) * learned).sum()
    slope = log_q.exp_()
    slope[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return loss, slope.mul_(learned[:, None])


def _log_softmax_(logits: Tensor) -> Tensor:
    """Log-probabilities over the last dimension, in the memory of the logits."""
    logits -= logits.amax(-1, keepdim=True)
    logits -= logits.logsumexp(-1, keepdim=True)
    return logits
