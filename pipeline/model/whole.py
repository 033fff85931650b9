"""A pruned model with weights of its own, which learn from the intact model.

Unlike in the paired forward nothing is shared: the student is the small model of an export, the teacher the intact one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nuteprune.config import LossConfig
from nuteprune.model.layers import build_view
from nuteprune.model.losses import IGNORE, LayerTerm, OutputTerm, weights
from nuteprune.model.losses.head import head_loss
from nuteprune.model.pairing import Losses, PairedModel


class Root(nn.Module):
    """Holds a model that is used in parts: whoever gathers its weights does so around what is done in `forward`."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Losses]) -> Losses:
        """What `work` returns."""
        return work()


class Distillation:
    """The losses of a small model beside the intact one; the same terms as those of the paired forward.

    Args:
        root: holds the student: the small model, float32, which computes in the teacher's type.
        teacher: the intact model, whole or partitioned.
        layers: which of the teacher's layers each of the student's is.
        hidden: which of the teacher's hidden dimensions the student has.
        loss: weights and forms of the terms.
    """

    def __init__(
        self, root: Root, teacher: PairedModel, layers: Sequence[int], hidden: Sequence[int], loss: LossConfig
    ):
        spec = teacher.spec
        self.root, self.student, self.teacher, self.layers, self.loss = root, root.model, teacher, layers, loss
        self.view = build_view(spec, None, {}, teacher.scaling, teacher.dtype)
        self.hidden = None if len(hidden) == spec.hidden else torch.tensor(hidden)
        self.final_scale = 1.0
        """What the last norm of a small Gemma leaves to the head, which shares its scaled embeddings (folding.py)."""
        if spec.embedding_root and root.model.config.tie_word_embeddings:
            self.final_scale = math.sqrt(spec.hidden / len(hidden))
        sizes = getattr(root.model.config, "layer_sizes", None)
        self.emptied = [sizes is not None and sizes(number) == ([], 0) for number in range(len(layers))]
        """Of each of the student's layers whether both sublayers are gone: no layer term counts it."""

    def __call__(self, ids: Tensor) -> Losses:
        """Losses of token ids [B, T]."""
        return self.root(lambda: self._losses(ids))

    def _losses(self, ids: Tensor) -> Losses:
        terms = weights(self.loss, taught=True)
        dtype, scale = self.teacher.dtype, self.teacher.spec.logits_scaling
        with torch.no_grad(), recorded(self.teacher.layers) as taught:
            target = self.teacher.hidden(ids, self.view)
        with self.computing(), recorded(self.student.model.layers) as streams:
            final = self.student.model(input_ids=ids, use_cache=False).last_hidden_state
        labels = F.pad(ids[:, 1:], (0, 1), value=IGNORE).flatten()
        output = {term: weight for term, weight in terms.items() if isinstance(term, OutputTerm)}
        rows, others = (each.flatten(0, 1).to(dtype) / scale for each in (final, target))
        normed, last = (final.to(dtype) * self.final_scale, self.kept(target)), self.teacher.spec.layers - 1
        own = self.student.lm_head.weight.to(dtype)
        found: dict[str, Tensor] = {}
        total = torch.zeros((), device=rows.device)
        if output:
            total, found = self.teacher.head.lend(
                lambda weight: head_loss(rows, own, output, self.loss, others, labels, weight)
            )
        for term, weight in terms.items():
            if isinstance(term, LayerTerm):
                of_layers = zip(streams, self.layers, self.emptied, strict=True)
                values = torch.stack([
                    self._of_layer(term, (stream.to(dtype), self.kept(taught[index])), normed if index == last else ())
                    for stream, index, emptied in of_layers if not emptied
                ])  # fmt: skip
                found[term.name] = term.over_layers(values if values.dim() == 1 else values.mean(1), self.loss)
                total = weight * found[term.name] + total
        return Losses(total, found)

    def _of_layer(self, term: LayerTerm, streams: tuple[Tensor, Tensor], normed: tuple[Tensor, ...]) -> Tensor:
        """Of the student's and the teacher's stream; `normed` has, behind the last layer, what the final norms made."""
        norm = dict(zip(streams, normed, strict=True)).__getitem__ if normed else None
        return term.of_layer(*streams, None, norm, self.loss)

    def computing(self) -> AbstractContextManager:
        """A block in which the student computes in the teacher's type."""
        dtype = self.teacher.dtype
        return torch.autocast(self.student.device.type, dtype, enabled=dtype != torch.float32)

    def kept(self, stream: Tensor) -> Tensor:
        """Of the teacher's stream [..., D] the dimensions that the student has."""
        return stream if self.hidden is None else stream[..., self.hidden.to(stream.device)]


@contextmanager
def recorded(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """What comes out of each layer, in order, of one forward pass in the block."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
