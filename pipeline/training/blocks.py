"""The layers of a small model, fitted one after the other before all its weights learn.

Each layer learns by itself, from the student's own stream, to lead it to the stream behind the intact model's layer:
what the layers before have left of an error is its to mend. Its attention and FFN learn whole; the norms before
and behind them stay. Steps of a layer cost what as few steps of the whole model cost, without its teacher and its head.

Shape letters: N sequences, T tokens of a sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from accelerate.utils import send_to_device
from torch import LongTensor, Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from nuteprune.model.whole import Distillation
from nuteprune.parallel.distributed import World
from nuteprune.runs.log import no_bar
from nuteprune.training.engine import LossScale
from nuteprune.training.gram import TOKENS_AT_ONCE, Streams

TOKENS = 118_784
"""Of the text, that the layers are fitted on."""
STEPS, STEP_TOKENS = 300, 1024
"""Steps of a layer, and tokens of each."""
RELATIVE_RATE, ATTENTION = 0.02, 0.3
"""Peak learning rate of an FFN's matrix over its root mean square, and that of attention's over an FFN's."""
_CACHES = "past_key_values", "cache"
_BETAS, _WARMUP, _EPS = (0.95, 0.95), 0.1, 1e-8
"""OneCycleLR lets the first fall to 0.85 while the rate rises, and rise again."""

Computing = Callable[[], AbstractContextManager]


def fit_blocks(
    distillation: Distillation, whole: PreTrainedModel | None, ids_NT: LongTensor, narrowed: Sequence[bool],
    world: World, shown: bool, halt: Callable[[], None],
) -> None:  # fmt: skip
    """Fit the layers of a student on rank 0, for which the others gather the teacher's weights. Collective.

    Args:
        distillation: the losses of both models.
        whole: the student on rank 0, where it may be in host memory: a layer at a time goes to the device.
        ids_NT: token ids, the same on all ranks.
        narrowed: of each layer of the student whether its FFN has lost units; the others are left alone.
        world: the ranks of the run.
        shown: show a progress bar.
        halt: called before each part of the text goes through a layer of the teacher, to end it by an exception.
    """
    device, computing = world.device, distillation.computing
    streams, passed = Streams(distillation.teacher, ids_NT, world), -1
    if whole is not None:
        parts, arguments = _first(whole, ids_NT, device)

    def learn(index: int) -> None:
        if whole is None:
            return
        layer = whole.model.layers[index].to(device)
        if narrowed[index] and any(p.numel() for p in layer.mlp.parameters()):
            target, dtype = distillation.kept(torch.cat(streams.parts)), distillation.teacher.dtype
            _fit(layer, torch.cat(parts), target, arguments[index], index, device, computing, dtype)
            bar.update()
        _advance(layer, parts, arguments[index], device, computing)
        layer.to(whole.device)

    with tqdm(total=sum(narrowed), desc="layers", unit="layer", leave=False, disable=no_bar(shown)) as bar:
        for index, known in enumerate(distillation.layers):
            while passed < known:
                passed += 1
                for _ in streams.through(passed, halt):
                    pass
            world.unhurried(partial(learn, index))


def _few(sequences: Tensor) -> int:
    """How many of sequences [N, T, …] are in a step of a layer."""
    return min(len(sequences), max(1, STEP_TOKENS // sequences.shape[1]))


@torch.no_grad()
def _first(
    whole: PreTrainedModel, ids_NT: LongTensor, device: torch.device
) -> tuple[list[Tensor], list[dict[int, dict]]]:
    """The first layer's input of each part of the text, in host memory, and what layers are called with beside it.

    That is of each layer by the number of sequences that go through at once.
    """
    layers, inputs = whole.model.layers, []
    arguments: list[dict[int, dict]] = [{} for _ in layers]

    def instead(index: int) -> Callable[..., Tensor]:
        def keep(stream: Tensor, **kwargs) -> Tensor:
            inputs.append(stream)
            found = {key: value for key, value in kwargs.items() if key not in _CACHES}
            arguments[index][len(stream)] = send_to_device(found, device)
            return stream

        return keep

    def through(ids: LongTensor) -> Tensor:
        inputs.clear()
        whole.model(input_ids=ids.to(whole.device), use_cache=False)
        return inputs[0].float().cpu()

    for index, layer in enumerate(layers):
        layer.forward = instead(index)
    try:
        through(ids_NT[: _few(ids_NT)])
        parts = [through(ids) for ids in ids_NT.split(max(1, TOKENS_AT_ONCE // ids_NT.shape[1]))]
    finally:
        for layer in layers:
            del layer.forward
    return parts, arguments


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
    layer: nn.Module, stream: Tensor, target: Tensor, arguments: dict[int, dict], seed: int, device: torch.device,
    computing: Computing, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Train a layer, a few sequences a step: each token's squared error over the target's square.

    As in every step of training, gradients that are not finite are left out.
    """
    parts = (layer.mlp, RELATIVE_RATE), (layer.self_attn, ATTENTION * RELATIVE_RATE)
    learning = [(w, rate) for part, rate in parts for w in part.parameters() if w.numel()]
    weights = [weight for weight, _ in learning]
    rates = [rate * float(weight.detach().square().mean().sqrt()) for weight, rate in learning]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, rates, strict=True)]
    adam = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0)
    cycle = OneCycleLR(adam, rates, total_steps=STEPS, pct_start=_WARMUP)
    generator, scale, few = torch.Generator().manual_seed(seed), LossScale(dtype), _few(stream)
    for _ in range(STEPS):
        rows = torch.randint(len(stream), (few,), generator=generator)
        wanted = target[rows].to(device).float()
        with computing():
            output = _stream(layer(stream[rows].to(device), **arguments[few])).float()
        error = (output - wanted).square().mean(-1) / (wanted.square().mean(-1) + _EPS)
        slopes = torch.autograd.grad(scale.value * error.mean(), weights, allow_unused=True)
        for weight, gradient in zip(weights, slopes, strict=True):
            weight.grad = gradient
        finite = bool(torch.stack([slope.isfinite().all() for slope in slopes if slope is not None]).all())
        scale.update(finite)
        if finite:
            adam.step()
        cycle.step()
    adam.zero_grad()
