"""G = Σ w h hᵀ of each layer's FFN units h, in one pass of a text: a layer at a time, as GPTQ and SparseGPT do it.

The hidden states of the text wait in host memory. A layer's weights are gathered once, all of the text goes through it,
and what comes out takes the place of what went in. Each rank reads its share of the text; a layer's G is summed on the
rank that keeps it.

Shape letters: N sequences or tokens, T tokens of a sequence, D hidden, F units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import LongTensor, Tensor
from tqdm.auto import tqdm

from nuteprune.arch import projections
from nuteprune.model.layers import activate, build_view
from nuteprune.parallel.distributed import World, gathered
from nuteprune.runs.log import no_bar

if TYPE_CHECKING:  # the planner reads numbers here, and does without transformers
    from nuteprune.model.pairing import PairedModel

TOKENS_AT_ONCE = 4096
"""That go through a layer, and into a product: enough that adding the product to G costs nothing beside it."""
_BLOCKS, _EPS = 8, 1e-8


class Streams:
    """The hidden states of a text on their way through the intact model.

    Args:
        model: the paired model.
        ids_NT: token ids of this rank; every rank has as many.
        world: the ranks of the run.
        place: where the hidden states wait.
        keep: whether this rank has any; it gathers weights for the others in any case.
    """

    def __init__(
        self, model: PairedModel, ids_NT: LongTensor, world: World, place: torch.device | str = "cpu", keep: bool = True
    ):
        self.model, self.device = model, world.device
        self.view = build_view(model.spec, None, {}, model.scaling, model.dtype)
        self.parts: list[Tensor] = []
        self._arguments: dict[int, list[dict]] = {}
        for ids in ids_NT.split(max(1, TOKENS_AT_ONCE // ids_NT.shape[1])):
            embedded = model.embedded(ids.to(self.device))
            if len(ids) not in self._arguments:
                self._arguments[len(ids)] = model.layer_arguments(embedded)
            if keep:
                self.parts.append(embedded.to(place, copy=True))

    def through(self, index: int, before_part: Callable[[], None]) -> Iterator[Tensor]:
        """Let all of the text through a layer; yields what comes out of it [N, T, D], part by part. Collective."""
        layer = self.model.layers[index].layer
        with gathered(*layer.parameters()):
            activate(layer, self.view.layers[index])
            for part in self.parts:
                before_part()
                output = layer(part.to(self.device), **self._arguments[len(part)][index])
                yield output
                part.copy_(output)


@torch.no_grad()
def measure_grams(
    model: PairedModel, ids_NT: LongTensor, layers: list[int], world: World, shown: bool, halt: Callable[[], None],
    keep: Callable[[int, Tensor | None], None],
) -> None:  # fmt: skip
    """Measure G [F, F] of layers. Collective.

    Args:
        ids_NT: this rank's share of the text.
        layers: whose G is wanted, rising.
        shown: show a progress bar.
        halt: called before each part of the text, to end it by an exception.
        keep: called on every rank for each of `layers`, with G (float32) where `owner_of` names it.
    """
    streams, count = Streams(model, ids_NT, world), layers[-1] + 1
    with tqdm(
        total=count * len(streams.parts), desc="FFN units", unit="batch", leave=False, disable=no_bar(shown)
    ) as bar:

        def before_part() -> None:
            halt()
            bar.update()

        for index in range(count):
            if index not in layers:
                for _ in streams.through(index, before_part):
                    pass
                continue
            total = gram_of(streams, index, before_part)
            here = world.sum_at(total, owner_of(index, world))
            if here:
                total.triu_()
                total += total.triu(1).T
            keep(index, total if here else None)


def owner_of(index: int, world: World) -> int:
    """The rank that keeps a layer's G and computes its pair."""
    return index % world.size


def gram_of(streams: Streams, index: int, before_part: Callable[[], None]) -> Tensor:
    """This rank's part of a layer's G [F, F], its upper triangle, on the device; the text is behind the layer then.

    A token counts 1 / the mean square of the stream behind the layer.
    """
    owner, name = projections(streams.model.layers[index].layer)["down_proj"]
    down, taken = getattr(owner, name), []
    total = torch.zeros(down.in_features, down.in_features, device=streams.device)
    hook = down.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].flatten(0, -2)))
    try:
        for output in streams.through(index, before_part):
            scale = (output.flatten(0, -2).float().square().mean(-1, keepdim=True) + _EPS).rsqrt()
            add_gram(total, taken.pop(), scale)
    finally:
        hook.remove()
    return total


def add_gram(total_FF: Tensor, h_NF: Tensor, scale_N1: Tensor) -> None:
    """Add (s h)ᵀ(s h) to the upper triangle of a float32 sum; of what lies below the diagonal's blocks, nothing.

    Activations of 16 bits are multiplied as bfloat16, and a product of `TOKENS_AT_ONCE` tokens is rounded to that: what
    that changes of the fit is a two-hundredth part of what another text changes (docs/experiments.md).
    """
    h_NF = h_NF.to(torch.bfloat16) if h_NF.element_size() == 2 else h_NF
    h_NF = h_NF * scale_N1.to(h_NF.dtype)
    size = len(total_FF)
    step = -(-size // _BLOCKS)
    for start in range(0, size, step):
        left_NB, right_NR = h_NF[:, start : start + step], h_NF[:, start:]
        block_BR = total_FF[start : start + step, start:]
        if h_NF.dtype == total_FF.dtype:
            block_BR.addmm_(left_NB.T, right_NR)
        else:
            block_BR += left_NB.T @ right_NR
