"""The paired forward: one pass over a Hugging Face model in which each layer serves teacher and student in turn.

The decoder layers are wrapped; transformers' own forward drives the student's stream, and the teacher's stream rides
along in a `_Pass`. Each layer adds its distillation term on the spot, so no list of hidden states is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from nuteprune.arch import ArchSpec
from nuteprune.config import LoraConfig, LossConfig
from nuteprune.masks import Gates
from nuteprune.model.kernels import install_kernels
from nuteprune.model.layers import LoraParameters, View, activate, at_hand, build_view, fresh_lora, install
from nuteprune.model.lora import Update
from nuteprune.model.losses import IGNORE, LayerTerm, OutputTerm, weights
from nuteprune.model.losses.head import head_loss


class Losses(NamedTuple):
    """Of one paired forward: the weighted total (to call backward on) and its terms by name, float32 scalars."""

    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class Answers:
    """What is to be learned of packed instruction records.

    Attributes:
        labels: [B, T] token ids, `IGNORE` where nothing is learned.
        positions: [B, T], from 0 in each record: attention does not cross from one record into another.
    """

    labels: Tensor
    positions: Tensor


@dataclass
class _Pass:
    """What the wrapped layers share during one forward."""

    student: View
    teacher: View | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    terms: dict[LayerTerm, list[Tensor]] = field(default_factory=dict)
    """What each layer term has of the layers so far."""
    teacher_stream: Tensor | None = None
    arguments: list[dict] | None = None
    """Where it is a list: what each layer is called with, instead of a computation."""


class PairedDecoderLayer(nn.Module):
    """A decoder layer that runs the teacher's hidden state (no grad), then the student's, and adds their distance."""

    def __init__(self, layer: nn.Module, index: int):
        super().__init__()
        self.layer, self.index = layer, index
        self.checkpointing = False
        self.current: _Pass | None = None
        self.final_norm: Callable[[Tensor], Tensor] | None = None
        """Of the last layer: the model's norm behind it."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """hidden_states [B, T, D] of the student to its output; the teacher's stream is read and replaced in place."""
        p = self.current
        assert p is not None  # `PairedModel._in_pass` sets it
        if p.arguments is not None:
            p.arguments.append(kwargs)
            return hidden_states
        if p.teacher is not None:
            p.teacher_stream = self._teacher(p, kwargs)
        student = self._student(hidden_states, p.student, kwargs)
        if not p.student.layers[self.index].kept.removed:
            for term, layers in p.terms.items():
                layers.append(term.of_layer(student, p.teacher_stream, p.student.hidden, self.final_norm, p.loss))
        return student

    def _teacher(self, p: _Pass, kwargs: dict) -> Tensor:
        assert p.teacher is not None
        with torch.no_grad():
            activate(self.layer, p.teacher.layers[self.index])
            return self.layer(p.teacher_stream, **kwargs)

    def _student(self, hidden: Tensor, view: View, kwargs: dict) -> Tensor:
        def run(x: Tensor) -> Tensor:
            # Inside the checkpointed function, so that the recomputation in backward sees the student again.
            activate(self.layer, view.layers[self.index])
            return self.layer(x, **kwargs)

        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(run, hidden, use_reentrant=False)
        return run(hidden)


class _Head(nn.Module):
    """Lends the output head's weight to a loss.

    ZeRO-3 gathers the weight for this module's forward. It would do so again for its backward, for nothing: the losses
    have their gradient by then (losses/head.py). So their result leaves in an attribute, past ZeRO-3's hooks on it.
    """

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight
        self._result: tuple[Tensor, dict[str, Tensor]] | None = None

    def forward(self, loss: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]) -> None:
        """Keep the losses of the weight for `lend`."""
        self._result = loss(self.weight)

    def lend(self, loss: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of the whole weight [V, D]."""
        self(loss)
        result, self._result = self._result, None
        assert result is not None
        return result


class PairedModel(nn.Module):
    """A frozen Hugging Face causal LM whose layers compute teacher and student together.

    Args:
        model: an unmodified transformers model of a supported family; its projections and layers are wrapped in place.
        spec: its architecture.
        lora: rank and targets of the student's LoRA.
        checkpointing: recompute each student layer in the backward pass (non-reentrant).
    """

    partitioning: tuple = ()
    """What shares the weights out over ranks, and lives as long as they do; empty where each rank has them whole."""

    def __init__(self, model: nn.Module, spec: ArchSpec, lora: LoraConfig, checkpointing: bool = False):
        super().__init__()
        model.requires_grad_(False)
        model.eval()
        self.spec, self.model = spec, model
        self.scaling = lora.scaling
        install(model.model.layers, spec)
        install_kernels(model.model.layers, model.model.norm, spec)
        self.head = _Head(model.lm_head.weight)
        pairs = fresh_lora(model.model.layers, lora, model.device)
        frozen = {key: lora.refit for key in pairs if lora.refit and key.endswith(".down_proj")}
        self.update = Update(pairs, frozen, model.dtype)
        model.model.layers = nn.ModuleList(
            PairedDecoderLayer(layer, index) for index, layer in enumerate(model.model.layers)
        )
        self._view: tuple[Gates | None, View] | None = None
        for layer in self.layers:
            layer.checkpointing = checkpointing
            for module in (layer, layer.layer, layer.layer.self_attn):
                at_hand(module)
        # Not a submodule of the layer: ZeRO-3 gathers a layer's own parameters, and norms are whole on every rank.
        object.__setattr__(self.layers[-1], "final_norm", model.model.norm)
        model.set_attn_implementation(_register_attention(model.config._attn_implementation))

    @property
    def layers(self) -> nn.ModuleList:
        """The wrapped decoder layers."""
        return self.model.model.layers

    def view(self, gates: Gates | None) -> View:
        """The student's view: these gates and the LoRA in training; the last one again while gates do not change."""
        if self._view is None or self._view[0] is not gates:
            self._view = (gates, self.student(gates))
        return self._view[1]

    def student(self, gates: Gates | None, skip_removed: bool = True) -> View:
        """The same view, made anew; see `build_view`."""
        own = self.update
        return build_view(self.spec, gates, own.lora, self.scaling, self.dtype, skip_removed, own.whole)

    @property
    def dtype(self) -> torch.dtype:
        """Compute type: that of the frozen weights."""
        return self.model.dtype

    def lora(self) -> LoraParameters:
        """The student's LoRA parameters by "layer.projection"; they are none of this module's `parameters()`."""
        return self.update.lora

    def forward(self, *given: Any) -> Losses:
        """What `losses` makes of them; or what a callable, given alone, returns.

        ZeRO-3 gathers weights around this module's forward, and fetches ahead in the order of the one before.
        """
        return given[0]() if callable(given[0]) else self.losses(*given)

    def losses(
        self, input_ids: Tensor, student: View, teacher: View | None, loss: LossConfig, answers: Answers | None = None
    ) -> Losses:
        """Distil the student from the teacher on one batch, or fit the next token where there is no teacher.

        With `answers`: fit their tokens, and distil on them with `loss.kl_weight` where there is a teacher.

        Args:
            input_ids: [B, T].
            student: view with gradient.
            teacher: view without, or None for the language-model loss.
            loss: weights and forms of the terms.
            answers: what is to be learned of windows of instruction records, see `instructions.packed_windows`.
        """
        terms = weights(loss, teacher is not None, answers is not None)
        p = _Pass(student, teacher, loss, {term: [] for term in terms if isinstance(term, LayerTerm)})
        embedded = self.model.get_input_embeddings()(input_ids)
        if teacher is not None:
            # The decoder itself multiplies the student's stream, which it is given.
            p.teacher_stream = _masked(embedded, teacher.hidden) * self.spec.embedding_multiplier
        positions = None if answers is None else answers.positions
        # ZeRO-3 frees a layer's weights when the gradient of its input is there: the first layer's needs one too.
        final = self._stream(_masked(embedded.detach().requires_grad_(), student.hidden), p, positions)
        output = {term: weight for term, weight in terms.items() if isinstance(term, OutputTerm)}
        total, found = self._output_losses(final, p, output, input_ids, answers)
        for term, layers in p.terms.items():
            found[term.name] = torch.stack(layers).sum() if layers else torch.zeros_like(total)
            total = terms[term] * found[term.name] + total
        return Losses(total, found)

    def _output_losses(
        self, final: Tensor, p: _Pass, terms: dict[OutputTerm, float], input_ids: Tensor, answers: Answers | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`head_loss` on the tokens that are learned: all of plain text, those of answers."""
        if not terms:
            return torch.zeros((), device=final.device), {}
        target = labels = None
        if any(term.needs_teacher for term in terms):
            with torch.no_grad():
                target = self.model.model.norm(p.teacher_stream).flatten(0, 1) / self.spec.logits_scaling
        if any(term.needs_labels for term in terms):
            labels = input_ids if answers is None else answers.labels
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
        rows = final.flatten(0, 1) / self.spec.logits_scaling
        if answers is not None:
            assert labels is not None
            learned = labels != IGNORE
            rows, labels, target = rows[learned], labels[learned], None if target is None else target[learned]
        return self.head.lend(lambda weight: head_loss(rows, weight, terms, p.loss, target, labels))

    def logits(self, input_ids: Tensor, view: View) -> Tensor:
        """Logits [B, T, V] of one view, in full."""
        return self.model.lm_head(self.hidden(input_ids, view)) / self.spec.logits_scaling

    def hidden(self, input_ids: Tensor, view: View) -> Tensor:
        """Final hidden states [B, T, D] of one view, after the last norm."""
        return self.behind(self.model.get_input_embeddings()(input_ids), view)

    def behind(self, embedded: Tensor, view: View, positions: Tensor | None = None) -> Tensor:
        """The same of the tokens' embeddings [B, T, D], with positions [B, T] of their own where records are packed."""
        return self._stream(_masked(embedded, view.hidden), _Pass(view), positions)

    def embedded(self, input_ids: Tensor) -> Tensor:
        """The first layer's input [B, T, D]."""
        return self.model.get_input_embeddings()(input_ids) * self.spec.embedding_multiplier

    def layer_arguments(self, embedded: Tensor) -> list[dict]:
        """What transformers calls each decoder layer with beside the stream: positions and mask of plain text.

        They depend on the shape of the stream [B, T, D] alone.
        """
        p = _Pass(View([]), arguments=[])
        self._stream(embedded, p)
        assert p.arguments is not None
        return p.arguments

    def _stream(self, embedded: Tensor, p: _Pass, positions: Tensor | None = None) -> Tensor:
        with self._in_pass(p):
            output = self.model.model(inputs_embeds=embedded, position_ids=positions, use_cache=False)
            return output.last_hidden_state

    @contextmanager
    def _in_pass(self, p: _Pass):
        layers = [vars(layer) for layer in self.layers]
        for layer in layers:
            layer["current"] = p
        try:
            yield
        finally:
            for layer in layers:
                layer["current"] = None


def _masked(embedded: Tensor, hidden: Tensor | None) -> Tensor:
    return embedded if hidden is None else embedded * hidden.to(embedded.dtype)


def _register_attention(base: str) -> str:
    """Register transformers' attention `base` with ragged KV groups allowed; returns the implementation's name.

    Flash attention keeps its name: under another with "flash" in it, transformers looks for a kernel on the hub.
    """
    name = base if base.startswith("flash") else f"nuteprune_{base}"
    if base == "eager":
        from transformers.models.llama.modeling_llama import eager_attention_forward as inner
    else:
        inner = AttentionInterface()[base]
    if not _is_wrapped(inner):
        AttentionInterface.register(name, _ragged(inner))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[base])
    return name


def _is_wrapped(attention: Callable | None) -> bool:
    """Whether `_ragged` is among the wrappers of an attention function (a per_layer export's file brings its own)."""
    while attention is not None and not hasattr(attention, "takes_kv_index"):
        attention = getattr(attention, "inner", None)
    return attention is not None


def _ragged(inner: Callable) -> Callable:
    def attention(module, query, key, value, attention_mask, **kwargs):
        if query.shape[1] == 0:
            return query.transpose(1, 2), None
        index = getattr(module, "kv_index", None)  # other models of the process may use flash attention too
        if index is not None:
            key, value = key[:, index], value[:, index]
        return inner(module, query, key, value, attention_mask, **kwargs)

    wrapper: Any = attention
    wrapper.inner, wrapper.takes_kv_index = inner, True
    return wrapper
