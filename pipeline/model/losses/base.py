"""What a term of the loss is: one of the two streams behind each layer, or one of the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from nuteprune.config import LossConfig

IGNORE = -100
"""Label of a token that is not learned."""


class Term:
    """A term of the loss; `losses.TERMS` lists them.

    Its weight is the setting `loss.NAME_weight`, its scalar in logs and charts `NAME_loss`. Every rank computes it for
    its own part of a batch, so it calls no other rank.
    """

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True

    def weight(self, config: LossConfig, taught: bool, answers: bool) -> float:
        """Its weight in a step; where that is 0 it is not computed.

        Args:
            taught: whether there is a teacher.
            answers: whether the step is one on instruction records.
        """
        return getattr(config, f"{self.name}_weight") if taught or not self.needs_teacher else 0.0


class LayerTerm(Term):
    """A term of the student's and the teacher's residual stream, summed over the layers that the student has."""

    kept: ClassVar[int]
    """For the planner: float32 tensors [B, T, D] that each layer keeps for the backward pass."""

    def of_layer(
        self, student: Tensor, teacher: Tensor, hidden_gate: Tensor | None, norm: Callable[[Tensor], Tensor] | None,
        config: LossConfig,
    ) -> Tensor:  # fmt: skip
        """Of one layer, a float32 scalar.

        Args:
            student: [B, T, D], with gradient.
            teacher: [B, T, D], without.
            hidden_gate: [D] of the student, or None; removed dimensions are 0 in its stream, not in the teacher's.
            norm: behind the last layer the model's final norm, else None.
        """
        raise NotImplementedError


class OutputTerm(Term):
    """A term of the logits, of which only a chunk of tokens' worth exists at a time.

    The output head is frozen, so a term computes its gradient in the logits at once and no graph is kept.
    """

    needs_labels: ClassVar[bool] = False
    """Whether the mean is over the tokens with a label, and not over all."""
    copies: ClassVar[int]
    """For the planner: float32 tensors [chunk, V] alive at once beside the student's logits."""

    def of_chunk(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor | None, config: LossConfig
    ) -> tuple[Tensor, Tensor]:
        """Its sum over the rows, a scalar, and the gradient of that in the student's logits [N, V].

        Args:
            student, teacher: logits [N, V], float32, which may be overwritten; no teacher unless `needs_teacher`.
            labels: [N], `IGNORE` where nothing is learned; None unless `needs_labels`.
        """
        raise NotImplementedError


def log_softmax_(logits: Tensor) -> Tensor:
    """Log-probabilities over the last dimension, in the memory of the logits."""
    logits -= logits.amax(-1, keepdim=True)
    logits -= logits.logsumexp(-1, keepdim=True)
    return logits
