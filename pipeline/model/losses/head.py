"""The output terms in chunks of tokens, through the frozen output head."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nuteprune.config import LossConfig
from nuteprune.model.losses.base import IGNORE, OutputTerm

CHUNK = 256
"""Tokens whose logits over the whole vocabulary exist at once."""


class _ChunkedHeadLoss(torch.autograd.Function):
    """Terms on full-vocabulary logits of which only `CHUNK` tokens' worth exists at a time.

    The head is frozen, so the gradient of the hidden states is computed chunk by chunk in the forward pass and scaled
    in the backward pass; no logits are kept and none are computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, teacher, teacher_weight, labels, terms, config):
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        sums = list(torch.zeros(len(terms), dtype=torch.float32, device=hidden.device))
        tokens, last = hidden.shape[0], list(terms)[-1]
        last_taught = next((term for term in reversed(terms) if term.needs_teacher), None)
        learned = None if labels is None else (labels != IGNORE).sum().clamp(min=1)  # on the device: nothing waits
        for start in range(0, tokens, CHUNK):
            rows = slice(start, start + CHUNK)
            logits = F.linear(hidden[rows], weight).float()
            target = None if last_taught is None else F.linear(teacher[rows], teacher_weight).float()
            slope = None
            for total, (term, factor) in zip(sums, terms.items(), strict=True):
                # The last that reads logits may have them; those before it get a copy to overwrite.
                own = logits if term is last else logits.clone()
                other = target if term is last_taught or target is None or not term.needs_teacher else target.clone()
                loss, own = term.of_chunk(own, other, labels[rows] if term.needs_labels else None, config)
                total += loss / (learned if term.needs_labels else tokens)
                own *= factor * tokens / learned if term.needs_labels else factor
                slope = own if slope is None else slope.add_(own)
            if gradient is not None:
                assert slope is not None  # there is a term
                gradient[rows] = slope.to(weight.dtype).mm(weight)
        ctx.save_for_backward(gradient)
        ctx.tokens = tokens
        ctx.mark_non_differentiable(*sums)
        return sum(factor * total for total, factor in zip(sums, terms.values(), strict=True)), *sums

    @staticmethod
    def backward(ctx, grad_output, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_output / ctx.tokens).to(gradient.dtype), *[None] * 6


def head_loss(
    student: Tensor, weight: Tensor, terms: Mapping[OutputTerm, float], config: LossConfig,
    teacher: Tensor | None = None, labels: Tensor | None = None, teacher_weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The weighted sum of output terms (with gradient), and each of them by name; float32 scalars, means over tokens.

    Args:
        student: final hidden states [N, D]; the gradient goes to them.
        weight: output head [V, D], frozen, in their type.
        terms: at least one, with their weights.
        config: `chunk`, and what the terms read.
        teacher: final hidden states [N, D], where a term needs them.
        labels: token ids [N], where a term needs them; `IGNORE` where there is nothing to learn.
        teacher_weight: the teacher's output head, where it is another.
    """
    other = weight if teacher_weight is None else teacher_weight
    total, *values = _ChunkedHeadLoss.apply(student, weight, teacher, other, labels, dict(terms), config)
    return total, dict(zip((term.name for term in terms), values, strict=True))
