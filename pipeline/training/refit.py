"""FFN units that stay make up for those that leave: least squares of down_proj, held in ranks of its LoRA.

With h the FFN's activations, K the units that stay and R those that leave, W_R h_R is predicted from h_K:

    ΔW = W_R G_RK (G_KK + ridge)⁻¹,  G = Σ w h hᵀ over tokens of the text

with the intact model's own activations, each token weighted by w = 1 / the mean square of the stream, as in the layer
term of the loss, so that a few tokens with massive activations do not rule it. (Frantar et al. 2022, arXiv 2208.11580,
fit a layer's weights so; SlimLLM, ICML 2025, those of output matrices.) Kept is what adds most to the output: with U
the leading eigenvectors of S = ΔW G_KK ΔWᵀ the pair is A = `PART` Uᵀ ΔW, B = U.

Shape letters: D hidden, F units, K units that stay, R units that leave, Q ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import LongTensor, Tensor, nn
from tqdm import tqdm

from nuteprune.arch import projections
from nuteprune.config import Config
from nuteprune.data.text import BatchStream
from nuteprune.masks import Gates
from nuteprune.masks.schedule import settle_step
from nuteprune.model.layers import build_view
from nuteprune.model.pairing import PairedDecoderLayer, PairedModel
from nuteprune.parallel.distributed import World
from nuteprune.parallel.zero import gathered

log = logging.getLogger(__name__)

RIDGE, PART = 0.3, 0.7
"""Of a unit's own mean square: a unit that fires on few tokens is not fitted to them. And the part of ΔW that is taken:
on text of other kinds than the one it is fitted on all of it is too much (docs/experiments.md)."""
TOKENS = 32
"""Tokens of text that are looked at, for each unit of a layer; all of a text that has fewer."""
TIMES = 25
"""How often the pairs are computed anew while units leave."""
DEVICE_BYTES = 4 * 2**30
"""For the G of the layers that are measured at a time."""
_EPS, _ITERATIONS = 1e-8, 3


class Refit:
    """Writes the first ranks of down_proj's LoRA, which are not trained.

    Each rank of the run holds the G of every n-th layer, computes the pairs of those and gets the others'.

    Args:
        model: the paired model; layers without LoRA on down_proj (experts, say) are left alone.
        config: Q (`lora.refit`), batches, when the gates settle.
        world: the ranks of the run.
        blocks: token ids [N, T] of the text, of which all ranks read the same.
        total: steps of the run.

    Attributes:
        every: steps between two refits while units leave; the same after a resume.
    """

    def __init__(self, model: PairedModel, config: Config, world: World, blocks: LongTensor, total: int):
        self.model, self.ranks, self.world = model, config.lora.refit, world
        self.stream = BatchStream(blocks, config.train.batch_size, config.seed)
        self.micro_batch = config.train.micro_batch
        self.shown = config.tracking.progress and world.is_main
        self.every = max(1, min(settle_step(config, total), total) // TIMES)
        self._grams: dict[int, Tensor] | None = None

    @torch.no_grad()
    def apply(self, gates: Gates) -> None:
        """Set the pairs to those of the units whose gate is 0; collective."""
        model, gate_LF = self.model, gates.ffn_gate(self.model.spec)
        if gate_LF is None:
            return
        grams, parts = self.measure(), []
        for index, layer in enumerate(model.layers):
            pair = model.lora().get(f"{index}.down_proj")
            if pair is None:
                continue
            a_QF, b_DQ = pair[0][: self.ranks], pair[1][:, : self.ranks]
            parts += [a_QF, b_DQ]
            with gathered(_projection(layer, "down_proj").weight) as weight_DF:
                if index in grams:
                    a, b = low_rank(weight_DF, grams[index].to(weight_DF.device), gate_LF[index], self.ranks)
                    a_QF.copy_(a)
                    b_DQ.copy_(b / model.scaling)
                else:
                    a_QF.zero_()
                    b_DQ.zero_()
        if self.world.size > 1 and parts:
            whole = self.world.sum(torch.cat([part.flatten() for part in parts]))
            for part, values in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
                part.copy_(values.view_as(part))

    @torch.no_grad()
    def measure(self, halt: Callable[[], None] = lambda: None) -> dict[int, Tensor]:
        """G [F, F] of this rank's layers, float32, in host memory; read off the text once. Collective.

        As many layers at a time as `DEVICE_BYTES` hold; each time all of the model reads the text.

        Args:
            halt: called before each batch, to end it by an exception.
        """
        if self._grams is not None:
            return self._grams
        spec, world, lora = self.model.spec, self.world, self.model.lora()
        at_once = max(1, DEVICE_BYTES // (4 * spec.ffn**2))
        count = math.ceil(math.ceil(spec.layers / world.size) / at_once)  # the same on every rank, as ZeRO-3 needs it
        own = [i for i in range(world.rank, spec.layers, world.size) if f"{i}.down_proj" in lora]
        tokens = self.stream.batch(0).numel()
        batches = math.ceil(min(TOKENS * spec.ffn / tokens, self.stream.steps_per_epoch))  # no text twice
        log.info("measuring the FFN units on %d tokens", batches * tokens)
        grams: dict[int, Tensor] = {}
        with tqdm(total=count * batches, desc="FFN units", unit="batch", leave=False, disable=not self.shown) as bar:

            def before_batch() -> None:
                halt()
                bar.update()

            for number in range(count):
                layers = own[number * at_once : (number + 1) * at_once]
                grams |= self._measure_layers(layers, batches, before_batch)
        self._grams = grams
        return grams

    def _measure_layers(self, layers: list[int], batches: int, before_batch: Callable[[], None]) -> dict[int, Tensor]:
        model, spec, device, activations = self.model, self.model.spec, self.world.device, {}
        grams = {i: torch.zeros(spec.ffn, spec.ffn, device=device) for i in layers}

        def before_ffn(index: int):
            gate, up = (_projection(model.layers[index], name) for name in ("gate_proj", "up_proj"))

            def hook(block, inputs):
                activation = getattr(block, "act_fn", None) or block.activation_fn  # Phi-3's name
                activations[index] = (activation(gate(inputs[0])) * up(inputs[0])).flatten(0, -2).float()

            return hook

        def behind_layer(index: int):
            def hook(_layer, _inputs, output):
                stream = (output if isinstance(output, Tensor) else output[0]).flatten(0, -2).float()
                h_NF = activations.pop(index, None)
                if h_NF is not None:
                    h_NF *= (stream.square().mean(-1, keepdim=True) + _EPS).rsqrt()
                    grams[index].addmm_(h_NF.T, h_NF)

            return hook

        hooks = []
        for index in layers:
            layer = model.layers[index].layer
            hooks.append(layer.mlp.register_forward_pre_hook(before_ffn(index)))
            hooks.append(layer.register_forward_hook(behind_layer(index)))
        view = build_view(spec, None, {}, model.scaling, model.dtype)
        try:
            for number in range(batches):
                before_batch()
                batch = self.stream.batch(number).to(device)
                for ids in batch.split(self.micro_batch or len(batch)):
                    model.hidden(ids, view)
        finally:
            for hook in hooks:
                hook.remove()
        return {index: gram.cpu() for index, gram in grams.items()}


def low_rank(weight_DF: Tensor, gram_FF: Tensor, gate_F: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """A [Q, F] and B [D, Q], float32: `PART` of the best update of those ranks; zero where there is none.

    Args:
        weight_DF: down_proj.
        gram_FF: G, float32.
        gate_F: gates of the units.
        ranks: Q.
    """
    (hidden, units), new = weight_DF.shape, gram_FF.new_zeros
    a, b = new(ranks, units), new(hidden, ranks)
    stays, leaves = (gate_F != 0).nonzero().flatten(), (gate_F == 0).nonzero().flatten()
    if not len(stays) or not len(leaves):
        return a, b
    among_KK = gram_FF[stays][:, stays]
    among_KK.diagonal().mul_(1 + RIDGE).add_(_EPS * gram_FF.diagonal().mean())  # a unit that never fires
    toward_KD = gram_FF[stays][:, leaves] @ weight_DF[:, leaves].float().T
    update_KD = torch.cholesky_solve(toward_KD, torch.linalg.cholesky(among_KK))
    adds_DD = toward_KD.T @ update_KD
    directions_DQ = _leading(adds_DD, min(ranks, hidden))
    found = directions_DQ.shape[1]
    b[:, :found] = directions_DQ
    a[:found, stays] = PART * directions_DQ.T @ update_KD.T
    return a, b


def _leading(matrix_DD: Tensor, count: int) -> Tensor:
    """An orthonormal basis [D, Q] of nearly the leading eigenvectors of a positive semidefinite matrix.

    By subspace iteration from a fixed start (Halko et al. 2011, algorithm 4.4): the same on every start of a run, and
    many times as fast as all eigenvectors.
    """
    generator = torch.Generator().manual_seed(0)
    extra = min(count + 8, len(matrix_DD))
    basis = torch.randn(len(matrix_DD), extra, generator=generator).to(matrix_DD.device)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix_DD @ basis).Q
    values = torch.linalg.eigh(basis.T @ matrix_DD @ basis)
    return basis @ values.eigenvectors[:, -count:].flip(1)


def _projection(layer: PairedDecoderLayer, name: str) -> nn.Module:
    owner, attribute = projections(layer.layer)[name]
    return getattr(owner, attribute)
