"""The label term: cross entropy of the next token."""

import torch
from torch import Tensor

from nuteprune.config import LossConfig
from nuteprune.model.losses.base import IGNORE, OutputTerm, log_softmax_


class Label(OutputTerm):
    """−log q[label], its gradient q − onehot."""

    name = "label"
    needs_teacher = False
    needs_labels = True
    copies = 1  # the exponentials of a softmax, or the gradient of another term

    def weight(self, config: LossConfig, taught: bool, answers: bool) -> float:
        """`loss.label_weight` beside a teacher of plain text; 1 where nothing else is learned, and of answers."""
        return config.label_weight if taught and not answers else 1.0

    def of_chunk(self, student, teacher, labels, config) -> tuple[Tensor, Tensor]:
        """See `OutputTerm`; the logits are overwritten."""
        learned = labels != IGNORE
        labels = labels.where(learned, 0)
        log_q = log_softmax_(student)
        loss = -(log_q.gather(1, labels[:, None]).squeeze(1) * learned).sum()
        slope = log_q.exp_()
        slope[torch.arange(len(labels), device=labels.device), labels] -= 1.0
        return loss, slope.mul_(learned[:, None])
