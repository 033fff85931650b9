"""FFN units that stay make up for those that leave: least squares of down_proj, held in a pair beside its LoRA.

With h the FFN's activations, K the units that stay and R those that leave, W_R h_R is predicted from h_K:

    ΔW = W_R G_RK (G_KK + ridge)⁻¹,  G = Σ w h hᵀ over tokens of the text

with the intact model's own activations, each token weighted by w = 1 / the mean square of the stream, as in the layer
term of the loss, so that a few tokens with massive activations do not rule it. (Frantar et al. 2022, arXiv 2208.11580,
fit a layer's weights so; SlimLLM, ICML 2025, those of output matrices.) Kept is what adds most to the output: with U
the leading eigenvectors of S = W_R G_RK (G_KK + ridge)⁻¹ G_KR W_Rᵀ the pair is A = `PART` Uᵀ ΔW, B = U.

Shape letters: D hidden, F units, K units that stay, R units that leave, Q ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nuteprune.arch import projections
from nuteprune.data.batches import BatchStream
from nuteprune.errors import UserError
from nuteprune.masks import Gates
from nuteprune.masks.schedule import Schedule
from nuteprune.parallel.distributed import World, gathered
from nuteprune.parallel.host import free_memory
from nuteprune.training.gram import measure_grams, owner_of
from nuteprune.training.preparation import Preparation

if TYPE_CHECKING:  # the planner reads numbers here, and does without transformers
    from nuteprune.model.pairing import PairedModel

log = logging.getLogger(__name__)

RIDGE, PART = 0.3, 0.7
"""Of a unit's own mean square: a unit that fires on few tokens is not fitted to them. And the part of ΔW that is taken:
on text of other kinds than the one it is fitted on all of it is too much (docs/experiments.md)."""
TOKENS = 32
"""Tokens of text that are looked at, for each unit of a layer; all of a text that has fewer."""
TIMES = 25
"""How often the pairs are computed anew while units leave."""
STORED_BYTES = 4 * 2**30
"""Of G that a run writes for a restart. More is measured again: several accelerators do that in the time that writing
takes."""
FEW = 0.4
"""Share of the units that leave, from which on a fit by those that stay costs less than one by those that leave."""
FP32 = 4
_EPS, _LEAST, _ITERATIONS = 1e-8, 1e-20, 3


class Refit:
    """Writes the frozen ranks of the update of down_proj.

    Each rank of the run keeps the G of every n-th layer, computes the pairs of those and gets the others'.

    Args:
        model: the paired model; layers without LoRA on down_proj (experts, say) are left alone.
        ranks: Q (`lora.refit`).
        schedule: when the gates settle.
        world: the ranks of the run.
        stream: the text, of which each rank reads its share.
        shown: whether a progress bar is.

    Attributes:
        every: steps between two refits while units leave; the same after a resume.
    """

    def __init__(
        self, model: PairedModel, ranks: int, schedule: Schedule, world: World, stream: BatchStream,
        shown: bool = False,
    ):  # fmt: skip
        self.model, self.ranks, self.world, self.stream, self.shown = model, ranks, world, stream, shown
        self.every = max(1, schedule.settle // TIMES)
        self.layers = [index for index in range(model.spec.layers) if f"{index}.down_proj" in model.update.frozen]
        self._measured = False
        self._packed: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] = {}

    @torch.no_grad()
    def apply(self, gates: Gates) -> None:
        """Set the pairs to those of the units whose gate is 0; all ranks at once, each those that it keeps."""
        model, device, gate_LF = self.model, self.world.device, gates.ffn_gate(self.model.spec)
        if gate_LF is None:
            return
        self.measure()
        parts = []
        for index in self.layers:
            a_QF, b_DQ = model.update.frozen[f"{index}.down_proj"]
            parts += [a_QF, b_DQ]
            if index in self._packed:
                weight_DF, packed_FF = (held[index].to(device) for held in (self._weights, self._packed))
                a, b = low_rank(weight_DF, packed_FF, gate_LF[index], self.ranks)
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
    def measure(self, halt: Callable[[], None] = lambda: None, store: Preparation | None = None) -> None:
        """Read the text, once; collective.

        Args:
            halt: called before each part of it, to end it by an exception.
            store: has what an earlier start measured, and keeps what this one does.

        Raises:
            UserError: the host's memory, or its disk, has no room for it.
        """
        if self._measured or not self.layers:
            return
        world, ffn = self.world, self.model.spec.ffn
        tokens = self.stream.batch(0).numel() * world.size
        batches = math.ceil(min(TOKENS * ffn / tokens, self.stream.steps_per_epoch))  # no text twice
        with world.together():
            self._check_memory(batches * tokens)
        store = store if len(self.layers) * FP32 * ffn**2 <= STORED_BYTES else None
        own = [index for index in self.layers if owner_of(index, world) == world.rank]
        found = {index: store.load(f"units-{index}") for index in own} if store else {}
        self._packed = {index: tensors["packed"] for index, tensors in found.items() if tensors is not None}
        missing = sorted(i for each in world.gather([i for i in own if i not in self._packed]) for i in each)
        if missing:
            log.info("measuring the FFN units on %d tokens", batches * tokens)
            ids = torch.cat([self.stream.batch(number) for number in range(batches)])
            measure_grams(self.model, ids, missing, world, self.shown, halt, lambda *layer: self._keep(store, *layer))
        for index in self.layers:
            weight = _down_proj(self.model.layers[index].layer)
            with gathered(weight):
                if index in self._packed:
                    self._weights[index] = weight.to("cpu", copy=True) if hasattr(weight, "ds_id") else weight
        self._measured = True

    def _keep(self, store: Preparation | None, index: int, gram_FF: Tensor | None) -> None:
        with self.world.together():
            if gram_FF is None:
                return
            if not gram_FF.isfinite().all():
                raise UserError(f"layer {index}: what comes out of the FFN of the intact model is not finite")
            self._packed[index] = packed(gram_FF).cpu()
            if store is not None:
                store.save(f"units-{index}", {"packed": self._packed[index]})

    def _check_memory(self, tokens: int) -> None:
        """Raise `UserError` unless this node's memory holds G, the text on its way and gathered weights."""
        spec, world, itemsize = self.model.spec, self.world, self.model.dtype.itemsize
        partitioned = hasattr(_down_proj(self.model.layers[0].layer), "ds_id")
        layer = FP32 * spec.ffn**2 + partitioned * itemsize * spec.ffn * spec.hidden
        own = math.ceil(len(self.layers) / world.size) * layer + tokens // world.size * spec.hidden * itemsize
        need, free = own * world.local_size, free_memory()
        if need > free:
            raise UserError(
                f"lora.refit: {need / 1e9:.1f} GB of this node's memory are needed until the gates settle, "
                f"{free / 1e9:.1f} GB are free: set lora.refit=0, or spread the run over more nodes"
            )

    def free(self) -> None:
        """Give the memory back, when the gates have settled."""
        self._packed, self._weights, self._measured = {}, {}, False


def packed(gram_FF: Tensor) -> Tensor:
    """G, overwritten, as P [F + 1, F]: M = G + ridge is the lower triangle of P[1:], M⁻¹ the upper one of P[:-1].

    With M⁻¹ a fit costs what the units that leave cost, which are few at first: with C = (M⁻¹)_RR it is
    M_KK⁻¹ G_KR = -(M⁻¹)_KR C⁻¹, and G_RK M_KK⁻¹ G_KR = M_RR - C⁻¹.
    """
    diagonal_F = gram_FF.diagonal()
    least = (_EPS * diagonal_F.mean()).clamp(min=_LEAST)  # for a unit that never fires, or an FFN of which none does
    diagonal_F.add_(RIDGE * diagonal_F + least)
    inverse_FF = torch.cholesky_inverse(torch.linalg.cholesky(gram_FF)).triu_()  # first: it takes room of its own
    packed_FF = gram_FF.new_zeros(len(gram_FF) + 1, len(gram_FF))
    packed_FF[:-1] = inverse_FF
    packed_FF[1:] += gram_FF.tril_()
    return packed_FF


def low_rank(weight_DF: Tensor, packed_FF: Tensor, gate_F: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """A [Q, F] and B [D, Q], float32: `PART` of the best update of those ranks; zero where there is none.

    Args:
        weight_DF: down_proj.
        packed_FF: of G, float32.
        gate_F: gates of the units.
        ranks: Q.
    """
    (hidden, units), new = weight_DF.shape, packed_FF.new_zeros
    a, b = new(ranks, units), new(hidden, ranks)
    stays, leaves = (gate_F != 0).nonzero().flatten(), (gate_F == 0).nonzero().flatten()
    if not len(stays) or not len(leaves):
        return a, b
    weight_RD = weight_DF[:, leaves].float().T
    found = min(ranks, hidden, len(leaves))  # the rank of what is fitted, at most
    if len(leaves) < FEW * units:
        inverse_RF = _rows(packed_FF[:-1], leaves, upper=True)
        factor_RR = torch.linalg.cholesky(inverse_RF[:, leaves])
        solved_RD = torch.linalg.solve_triangular(factor_RR, weight_RD, upper=False)
        among_RR = _rows(packed_FF[1:], leaves, upper=False)[:, leaves]
        b[:, :found] = _leading(weight_RD.T @ (among_RR @ weight_RD) - solved_RD.T @ solved_RD, found)
        toward_RQ = torch.linalg.solve_triangular(factor_RR.T, solved_RD @ b[:, :found], upper=True)
        a[:found] = (toward_RQ.T @ inverse_RF).mul_(-PART * (gate_F != 0))
    else:
        toward_KD = _rows(packed_FF[1:], leaves, upper=False)[:, stays].T @ weight_RD
        factor_KK = torch.linalg.cholesky(packed_FF[1:][stays][:, stays])  # it reads the lower triangle alone
        solved_KD = torch.linalg.solve_triangular(factor_KK, toward_KD, upper=False)
        b[:, :found] = _leading(solved_KD.T @ solved_KD, found)
        a[:found, stays] = PART * torch.linalg.solve_triangular(factor_KK.T, solved_KD @ b[:, :found], upper=True).T
    return a, b


def _rows(matrix_FF: Tensor, rows_R: Tensor, upper: bool) -> Tensor:
    """Rows [R, F] of a symmetric matrix of which one triangle is there."""
    order_1F, rows_R1 = torch.arange(len(matrix_FF), device=rows_R.device)[None], rows_R[:, None]
    there_RF = order_1F >= rows_R1 if upper else order_1F <= rows_R1
    return torch.where(there_RF, matrix_FF[rows_R], matrix_FF[:, rows_R].T)


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


def _down_proj(layer: nn.Module) -> Tensor:
    owner, attribute = projections(layer)["down_proj"]
    return getattr(owner, attribute).weight
