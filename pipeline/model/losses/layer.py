"""The layer term: distance of the student's residual stream from the teacher's, behind each layer."""

import torch
from torch import Tensor

from nuteprune.model.losses.base import LayerTerm


class Layer(LayerTerm):
    """The paper's eq. 8: the mean squared error over tokens and kept hidden dimensions.

    Behind the last layer it is of the normed streams, as in the authors' code: transformers calls those the last hidden
    state.
    """

    name = "layer"
    kept = 1  # the difference

    def of_layer(self, student, teacher, hidden_gate, norm, config) -> Tensor:
        """See `LayerTerm`."""
        if norm is not None:
            with torch.no_grad():
                teacher = norm(teacher)
            student = norm(student)
        squared = (student.float() - teacher.float()).square()
        if hidden_gate is None:
            return squared.mean()
        kept = (hidden_gate.detach() != 0).float()
        return ((squared * kept).sum(-1) / kept.sum().clamp(min=1)).mean()
