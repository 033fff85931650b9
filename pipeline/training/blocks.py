"""The layers of a small model, fitted one after the other before all its weights learn.

Each layer learns by itself, from the student's own stream, to lead it to the stream behind the intact model's layer:
what the layers before have left of an error is its to mend. Its attention and FFN learn whole; the norms before
and behind them stay. Steps of a layer cost what as few steps of the whole model cost, without its teacher and its head.

Rank 0 does it, with both streams of the text on its device; the others gather the teacher's weights for it.

Shape letters: N sequences, T tokens of a sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save
from torch import LongTensor, Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

from nuteprune.errors import MachineError
from nuteprune.parallel.distributed import World
from nuteprune.runs.checkpoint import write_atomic
from nuteprune.runs.log import no_bar
from nuteprune.training.gram import TOKENS_AT_ONCE, Streams

if TYPE_CHECKING:  # as in gram.py
    from transformers import PreTrainedModel

    from nuteprune.model.whole import Distillation

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
Arguments = dict[int, dict]
"""What a layer is called with beside the stream, by the number of sequences that go through at once."""


def fit_blocks(
    distillation: Distillation, whole: PreTrainedModel | None, ids_NT: LongTensor, narrowed: Sequence[bool],
    world: World, shown: bool, halt: Callable[[], None], saved: Path,
) -> None:  # fmt: skip
    """Fit the layers of a student on rank 0, for which the others gather the teacher's weights. Collective.

    Args:
        distillation: the losses of both models.
        whole: the student on rank 0, where it may be in host memory: a layer at a time goes to the device.
        ids_NT: token ids, the same on all ranks.
        narrowed: of each layer of the student whether its FFN has lost units; the others are left alone.
        world: the ranks of the run.
        shown: show a progress bar.
        halt: called before each layer of the student, on all ranks, to end it by an exception.
        saved: directory of the fitted layers, a file each: those that are there are read, the others written.
    """
    device, computing = world.device, distillation.computing
    streams, passed = Streams(distillation.teacher, ids_NT, world, device, keep=world.is_main), -1
    stream_NTD = None
    arguments: list[Arguments] = []
    if whole is not None:
        stream_NTD, arguments = _first(whole, ids_NT, device, distillation.teacher.dtype)

    def learn(index: int) -> None:
        if whole is None or stream_NTD is None:
            return
        layer = whole.model.layers[index].to(device)
        if narrowed[index] and any(p.numel() for p in layer.mlp.parameters()):
            file = saved / f"layer-{index:04d}.safetensors"
            if file.is_file():
                layer.load_state_dict(load_file(file, device=str(device)))
            else:
                target = distillation.kept(torch.cat(streams.parts))
                _fit(layer, stream_NTD, target, arguments[index], index, computing)
                _write(file, layer)
            bar.update()
        _advance(layer, stream_NTD, arguments[index], computing)
        layer.to(whole.device)

    with tqdm(total=sum(narrowed), desc="layers", unit="layer", leave=False, disable=no_bar(shown)) as bar:
        for index, known in enumerate(distillation.layers):
            halt()
            while passed < known:
                passed += 1
                for _ in streams.through(passed, _nothing):
                    pass
            world.unhurried(partial(learn, index))


def _write(file: Path, layer: nn.Module) -> None:
    tensors = {name: each.contiguous() for name, each in layer.state_dict().items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, save(tensors))
    except OSError as error:
        raise MachineError(f"cannot write {file}: {error.strerror}: free space, or use another run_dir") from None


def _nothing() -> None:
    """Before a part of the text."""


def _few(sequences: Tensor) -> int:
    """How many of sequences [N, T, …] are in a step of a layer."""
    return min(len(sequences), max(1, STEP_TOKENS // sequences.shape[1]))


def _parts(sequences: Tensor) -> tuple[Tensor, ...]:
    """Of sequences [N, T, …] those that go through a layer at once."""
    return sequences.split(max(1, TOKENS_AT_ONCE // sequences.shape[1]))


@torch.no_grad()
def _first(
    whole: PreTrainedModel, ids_NT: LongTensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, list[Arguments]]:
    """The first layer's input [N, T, D] on the device, and what each layer is called with beside it."""
    layers, inputs = whole.model.layers, []
    arguments: list[Arguments] = [{} for _ in layers]

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
        return inputs[0].to(device, dtype)

    for index, layer in enumerate(layers):
        layer.forward = instead(index)
    try:
        through(ids_NT[: _few(ids_NT)])
        stream_NTD = torch.cat([through(ids) for ids in _parts(ids_NT)])
    finally:
        for layer in layers:
            del layer.forward
    return stream_NTD, arguments


@torch.no_grad()
def _advance(layer: nn.Module, stream_NTD: Tensor, arguments: Arguments, computing: Computing) -> None:
    """Let the stream become what comes out of a layer."""
    for part in _parts(stream_NTD):
        with computing():
            part.copy_(_stream(layer(part, **arguments[len(part)])))


def _stream(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Of what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output


def _fit(
    layer: nn.Module, stream_NTD: Tensor, target_NTD: Tensor, arguments: Arguments, seed: int, computing: Computing
) -> None:
    """Train a layer, a few sequences a step: each token's squared error over the target's square.

    Gradients that are not finite are left out, which the optimizer sees on the device: nothing waits for a step.
    """
    parts = (layer.mlp, RELATIVE_RATE), (layer.self_attn, ATTENTION * RELATIVE_RATE)
    learning = [(w, rate) for part, rate in parts for w in part.parameters() if w.numel()]
    weights = [weight for weight, _ in learning]
    rates = [rate * float(weight.detach().square().mean().sqrt()) for weight, rate in learning]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, rates, strict=True)]
    adam = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0, fused=True)
    cycle = OneCycleLR(adam, rates, total_steps=STEPS, pct_start=_WARMUP)
    few, generator = _few(stream_NTD), torch.Generator().manual_seed(seed)
    for rows in torch.randint(len(stream_NTD), (STEPS, few), generator=generator).to(stream_NTD.device):
        wanted = target_NTD[rows].float()
        with computing():
            output = _stream(layer(stream_NTD[rows], **arguments[few])).float()
        error = (output - wanted).square().mean(-1) / (wanted.square().mean(-1) + _EPS)
        slopes = torch.autograd.grad(error.mean(), weights, allow_unused=True)
        for weight, slope in zip(weights, slopes, strict=True):
            weight.grad = slope
        odd = torch.stack([(slope * 0).sum() for slope in slopes if slope is not None]).sum() != 0  # a NaN is
        adam.found_inf = odd.float()
        adam.step()
        cycle.step()
    adam.zero_grad()
