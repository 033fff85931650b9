"""The layer term: distance of the student's residual stream from the teacher's, behind each layer."""

from typing import ClassVar

import torch
from torch import Tensor

from nuteprune.config import LossConfig
from nuteprune.kernels.api import rowwise_kernels
from nuteprune.model.losses.base import LayerTerm

_EPS = 1e-8


class Layer(LayerTerm):
    """`layer_loss`; the raw one is of the normed streams behind the last layer.

    That is what transformers, and so the authors' loss, name the last hidden state.
    """

    name = "layer"
    kept = 1  # the difference
    kernels: ClassVar = {"pointwise.distance": (3, 4), "pointwise.distance_backward": (5,)}

    def of_layer(self, student, teacher, hidden_gate, norm, config) -> Tensor:
        """See `LayerTerm`; by token where triton runs."""
        if norm is not None and config.layer == "raw":
            with torch.no_grad():
                teacher = norm(teacher)
            student = norm(student)
        kernels = rowwise_kernels(student, teacher)
        if kernels is None:
            return layer_loss(student, teacher, hidden_gate, config.layer)
        return kernels.layer_distances(student, teacher, hidden_gate, config.layer == "normalized")

    def over_layers(self, layers: Tensor, config: LossConfig) -> Tensor:
        """Mean, or the paper's sum of the raw ones."""
        return layers.sum() if config.layer == "raw" else layers.mean()


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
