"""A pruned model with weights of its own, which learn from the intact model.

Unlike in the paired forward nothing is shared: the student is the small model of an export, the teacher the intact one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nuteprune.config import LossConfig
from nuteprune.model.layers import build_view
from nuteprune.model.losses import IGNORE, output_weights
from nuteprune.model.losses.head import head_loss
from nuteprune.model.pairing import Answers, Losses, PairedModel


class Root(nn.Module):
    """Holds a model that is used in parts: whoever gathers its weights does so around what is done in `forward`."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Losses]) -> Losses:
        """What `work` returns."""
        return work()


def without_ends(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its token embeddings and output head."""
    model.set_input_embeddings(nn.Identity())
    model.set_output_embeddings(nn.Identity())
    return model


class Distillation:
    """The losses of a small model beside the intact one: the output terms of the paired forward.

    Args:
        root: holds the student: the small model, float32, which computes in the teacher's type.
        teacher: the intact model, whole or partitioned.
        layers: which of the teacher's layers each of the student's is.
        hidden: which of the teacher's hidden dimensions the student has.
        loss: weights and forms of the terms.
        shared: the student is without its ends, which are the teacher's.
        answers: what is learned are answers of instruction records.
    """

    def __init__(
        self, root: Root, teacher: PairedModel, layers: Sequence[int], hidden: Sequence[int], loss: LossConfig,
        shared: bool = False, answers: bool = False,
    ):  # fmt: skip
        spec = teacher.spec
        self.root, self.student, self.teacher, self.layers, self.loss = root, root.model, teacher, layers, loss
        self.view = build_view(spec, None, {}, teacher.scaling, teacher.dtype)
        self.hidden = None if len(hidden) == spec.hidden else torch.tensor(hidden)
        self.shared = shared
        self.terms = output_weights(loss, answers)

    def __call__(self, ids: Tensor, answers: Answers | None = None) -> Losses:
        """Losses of token ids [B, T]; of windows of instruction records those of their answers."""
        return self.teacher(lambda: self.root(lambda: self._losses(ids, answers)))

    def _losses(self, ids: Tensor, answers: Answers | None) -> Losses:
        dtype, scale = self.teacher.dtype, self.teacher.spec.logits_scaling
        positions = None if answers is None else answers.positions
        with torch.no_grad():
            embedded = self.teacher.model.get_input_embeddings()(ids)
            taught = any(term.needs_teacher for term in self.terms)
            target = self.teacher.behind(embedded, self.view, positions) if taught else embedded
            own = self.embedded(embedded, ids)
        with self.computing():
            final = self.student.model(inputs_embeds=own, position_ids=positions, use_cache=False).last_hidden_state
        labels = F.pad((ids if answers is None else answers.labels)[:, 1:], (0, 1), value=IGNORE).flatten()
        rows, others = (each.flatten(0, 1).to(dtype) / scale for each in (final, target))
        if answers is not None:
            rows, others, labels = (each[labels != IGNORE] for each in (rows, others, labels))
        head = None if self.shared else self.student.lm_head.weight.to(dtype)
        total, found = self.teacher.head.lend(
            lambda weight: head_loss(
                rows, weight if head is None else head, self.terms, self.loss, others, labels, weight
            )
        )
        return Losses(total, found)

    def embedded(self, intact: Tensor, ids: Tensor) -> Tensor:
        """The student's embeddings of token ids [B, T], in the teacher's type, given the intact model's."""
        return intact if self.shared else self.student.get_input_embeddings()(ids).to(self.teacher.dtype)

    def computing(self) -> AbstractContextManager:
        """A block in which the student computes in the teacher's type."""
        dtype = self.teacher.dtype
        return torch.autocast(self.student.device.type, dtype, enabled=dtype != torch.float32)

    def kept(self, stream: Tensor) -> Tensor:
        """Of the teacher's stream [..., D] the dimensions that the student has."""
        return stream if self.hidden is None else stream[..., self.hidden.to(stream.device)]
