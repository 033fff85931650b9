"""The FFNs of a small model, fitted one after the other before all its weights learn.

Each layer's FFN learns by itself, from the student's own stream, to lead it to the stream behind the intact model's
layer: what the layers before have left of an error is its to mend. Attention stays as it is. Steps of a layer cost what
as few steps of the whole model cost, without its teacher and its output head.

Shape letters: N sequences, T tokens of a sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import LongTensor, Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from nuteprune.model.whole import Distillation
from nuteprune.parallel.distributed import World
from nuteprune.training.gram import TOKENS_AT_ONCE, Streams

TOKENS = 65_536
"""Of the text, that the FFNs are fitted on."""
STEPS, STEP_TOKENS = 200, 1024
"""Steps of a layer, and tokens of each."""
RELATIVE_RATE = 0.02
"""Peak learning rate of a matrix over its root mean square."""
_CACHES = "past_key_values", "cache"
_BETAS, _WARMUP, _EPS = (0.9, 0.95), 0.1, 1e-8

Computing = Callable[[], AbstractContextManager]


class _Known(nn.Module):
    """In place of a layer's attention, what that has given for these tokens."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, *_args, **_kwargs) -> tuple[Tensor, None]:
        return self.output, None


def fit_blocks(
    distillation: Distillation, ids_NT: LongTensor, narrowed: Sequence[bool], world: World, shown: bool,
    halt: Callable[[], None],
) -> None:  # fmt: skip
    """Fit the FFNs of the student. Collective; every rank ends with the weights of rank 0.

    Args:
        distillation: both models.
        ids_NT: token ids, the same on all ranks.
        narrowed: of each layer of the student whether its FFN has lost units; the others are left alone.
        world: the ranks of the run.
        shown: show a progress bar.
        halt: called before each part of the text goes through a layer of the teacher, to end it by an exception.
    """
    student, device, computing = distillation.student, world.device, distillation.computing
    streams, passed = Streams(distillation.teacher, ids_NT, world), -1
    parts, arguments = [part.float() for part in _embedded(distillation, ids_NT)], _arguments(distillation, ids_NT)
    with tqdm(total=sum(narrowed), desc="FFN blocks", unit="layer", leave=False, disable=not shown) as bar:
        for index, layer in enumerate(student.model.layers):
            while passed < distillation.layers[index]:
                passed += 1
                for _ in streams.through(passed, halt):
                    pass
            if narrowed[index] and any(p.numel() for p in layer.mlp.parameters()):
                target = distillation.kept(torch.cat(streams.parts))
                attended = _attended(layer, parts, arguments[index], device, computing)
                _fit(
                    layer, torch.cat(parts), attended, target, arguments[index], _few(ids_NT), index, device, computing
                )
                _from_main(layer.mlp, world)
                bar.update()
            _advance(layer, parts, arguments[index], device, computing)


def _few(ids_NT: LongTensor) -> int:
    """Sequences of a step of a layer."""
    return min(len(ids_NT), max(1, STEP_TOKENS // ids_NT.shape[1]))


@torch.no_grad()
def _embedded(distillation: Distillation, ids_NT: LongTensor) -> list[Tensor]:
    """The first layer's input of each part of the text, in host memory."""
    embedding, multiplier = distillation.student.get_input_embeddings(), distillation.teacher.spec.embedding_multiplier
    rows, device = max(1, TOKENS_AT_ONCE // ids_NT.shape[1]), distillation.student.device
    return [(embedding(ids.to(device)) * multiplier).cpu() for ids in ids_NT.split(rows)]


@torch.no_grad()
def _arguments(distillation: Distillation, ids_NT: LongTensor) -> list[dict[int, dict]]:
    """What each layer is called with beside the stream, by the number of sequences that go through at once."""
    layers, device = distillation.student.model.layers, distillation.student.device
    found: list[dict[int, dict]] = [{} for _ in layers]
    rows = max(1, TOKENS_AT_ONCE // ids_NT.shape[1])
    sizes = {min(rows, len(ids_NT)), len(ids_NT) % rows or rows, _few(ids_NT)}

    def hook(index: int) -> Callable[[nn.Module, tuple, dict], None]:
        def keep(_module: nn.Module, inputs: tuple, kwargs: dict) -> None:
            found[index][len(inputs[0])] = {key: value for key, value in kwargs.items() if key not in _CACHES}

        return keep

    hooks = [layer.register_forward_pre_hook(hook(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        for size in sizes:
            with distillation.computing():
                distillation.student.model(input_ids=ids_NT[:size].to(device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return found


@torch.no_grad()
def _attended(
    layer: nn.Module, parts: list[Tensor], arguments: dict[int, dict], device: torch.device, computing: Computing
) -> Tensor:
    """What a layer's attention gives for the stream [N, T, D], in host memory."""
    found: list[Tensor] = []
    hook = layer.self_attn.register_forward_hook(lambda _module, _inputs, output: found.append(output[0].cpu()))
    try:
        for part in parts:
            with computing():
                layer(part.to(device), **arguments[len(part)])
    finally:
        hook.remove()
    return torch.cat(found)


@torch.no_grad()
def _advance(
    layer: nn.Module, parts: list[Tensor], arguments: dict[int, dict], device: torch.device, computing: Computing
) -> None:
    """Let the parts of the stream become what comes out of a layer."""
    for part in parts:
        with computing():
            part.copy_(_stream(layer(part.to(device), **arguments[len(part)])))


def _stream(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Of what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output


def _fit(
    layer: nn.Module, stream: Tensor, attended: Tensor, target: Tensor, arguments: dict[int, dict], few: int, seed: int,
    device: torch.device, computing: Computing,
) -> None:  # fmt: skip
    """Train a layer's FFN, on `few` sequences a step: each token's squared error over its mean square in the target."""
    weights = list(layer.mlp.parameters())
    rates = [RELATIVE_RATE * float(weight.detach().square().mean().sqrt()) for weight in weights]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, rates, strict=True)]
    adam = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0)
    cycle = OneCycleLR(adam, rates, total_steps=STEPS, pct_start=_WARMUP)
    generator, attention = torch.Generator().manual_seed(seed), layer.self_attn
    buffers = [weight.grad for weight in weights]  # of the optimizer that comes after
    try:
        for _ in range(STEPS):
            rows = torch.randint(len(stream), (few,), generator=generator)
            wanted = target[rows].to(device).float()
            layer.self_attn = _Known(attended[rows].to(device))
            with computing():
                output = _stream(layer(stream[rows].to(device), **arguments[few])).float()
            error = (output - wanted).square().mean(-1) / (wanted.square().mean(-1) + _EPS)
            for weight, gradient in zip(weights, torch.autograd.grad(error.mean(), weights), strict=True):
                weight.grad = gradient
            adam.step()
            cycle.step()
    finally:
        layer.self_attn = attention
        for weight, buffer in zip(weights, buffers, strict=True):
            weight.grad = buffer


@torch.no_grad()
def _from_main(module: nn.Module, world: World) -> None:
    """Give every rank rank 0's weights: what a card computes may differ from another's by rounding."""
    for weight in module.parameters():
        weight.copy_(world.sum(weight if world.is_main else torch.zeros_like(weight)))
