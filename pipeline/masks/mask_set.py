"""The learned gates of one run: log-alpha by kind, sampling, the constraint by projection, settling to 0/1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from nuteprune.arch import ArchSpec
from nuteprune.config import GateConfig
from nuteprune.errors import UserError
from nuteprune.masks import hard_concrete as hc
from nuteprune.masks.counts import Rounding
from nuteprune.masks.gates import KINDS, Gates, kept_parameters, sparsity_of, unit_shape
from nuteprune.masks.selection import cheapest_units, most_removed, select_units

DROP_RATE = 0.01
"""Probability that a unit is dropped at the start (the paper's); `gates.init=importance` replaces it."""
POINT = 0.01
"""The exported sparsity may be this far from the target."""
_MARGIN = 60.0
"""How far beyond the spread of log-alpha the projection looks for its shift."""
_POINTS, _ROUNDS = 8, 10
"""Places at once and rounds of its search: a ninth each, which from ±0.1 ends within 1e-9."""
_FIRST = (-25.0, -8.0, -1.0, -0.1, 0.1, 1.0, 8.0, 25.0)
"""Its first places."""
_ALIKE = {
    "uniform": {"heads", "kv_groups", "ffn", "experts"}, "per_layer_ffn": {"heads", "kv_groups"}, "per_layer": set(),
}  # fmt: skip
"""By shape, the kinds of which every layer keeps the same count."""


def gated_kinds(spec: ArchSpec, units: Sequence[str]) -> list[str]:
    """The kinds that get gates.

    Without grouped queries a head is its own KV group, so one gate serves both; a layer's only group is its whole
    attention, which `attn_sublayers` stands for, and its only FFN is no expert.
    """
    kinds = [k for k in KINDS if k in units]
    if "kv_groups" in kinds and (spec.kv_heads == 1 or (spec.group_size == 1 and "heads" in kinds)):
        kinds.remove("kv_groups")
    if "experts" in kinds and spec.experts == 1:
        kinds.remove("experts")
    return kinds


def check_target(spec: ArchSpec, config: GateConfig, target: float, lora: Sequence[str] = ()) -> None:
    """Raise `UserError` if the selected units cannot reach the target, or cannot be removed in the shape asked.

    Or if the family cannot have LoRA on the projections in `lora`.
    """
    if (refusal := spec.refusal(config.units)) is not None:
        raise UserError(f"gates.units: {refusal}")
    if config.shape == "uniform" and {"attn_sublayers", "ffn_sublayers"} & set(config.units):
        raise UserError(
            "gates.units: whole sublayers need gates.shape=per_layer_ffn or per_layer (no stock model lacks a "
            "sublayer); in the uniform shape gate `layers`"
        )
    if (refusal := spec.refusal([config.shape])) is not None:
        raise UserError(f"gates.shape: {refusal}")
    if (refusal := spec.refusal(lora)) is not None:
        raise UserError(f"lora.targets: {refusal}")
    kinds = gated_kinds(spec, config.units)
    most = most_removed(spec, kinds, config.shape)
    if target > most:
        raise UserError(
            f"sparsity.target {target:g} is out of reach: removing {', '.join(config.units)} takes away at most "
            f"{most:.3f} of this model; add units to gates.units or lower the target"
        )
    generator = torch.Generator().manual_seed(0)
    scores = {k: torch.rand(unit_shape(spec, k), generator=generator) for k in kinds}
    nearest = sparsity_of(spec, select_units(spec, scores, target, config.shape, Rounding.of(config)))
    if abs(nearest - target) > POINT:
        raise UserError(
            f"sparsity.target {target:g}: {', '.join(config.units)} are so coarse in the {config.shape} shape that the "
            f"nearest reachable sparsity is {nearest:.3f}; use that, or add ffn to gates.units"
        )


class MaskSet(nn.Module):
    """Hard-concrete gates of a model.

    Args:
        spec: the architecture.
        config: which units, temperature, optimizer, shape.

    Attributes:
        log_alpha: float32 parameters by kind, shapes as in `unit_shape`.
        fixed: gates that no longer change once settled, else None.
        noise: current scale of the sampling noise.
    """

    def __init__(self, spec: ArchSpec, config: GateConfig):
        super().__init__()
        self.spec, self.config = spec, config
        self.kinds = gated_kinds(spec, config.units)
        # As in the public code of Louizos et al.: log-alpha = logit(1 - drop rate), and a little noise to break ties.
        start = math.log(1 - DROP_RATE) - math.log(DROP_RATE)
        self.log_alpha = nn.ParameterDict(
            {k: nn.Parameter(start + 0.01 * torch.randn(unit_shape(spec, k))) for k in self.kinds}
        )
        self.fixed: Gates | None = None
        self._settled_sparsity: Tensor | None = None
        self._ones: dict[tuple[str, torch.device], Tensor] = {}
        self.noise = config.noise

    def sample(self, generator: torch.Generator) -> Gates:
        """Sampled gates, differentiable in log-alpha; the settled ones once settled."""
        if self.fixed is not None:
            return self.fixed
        gates = {}
        for kind, la in self.log_alpha.items():
            u = torch.rand(la.shape, generator=generator).to(la.device)
            gates[kind] = hc.sample(la, u, self.config.temperature, self.noise)
        return Gates(**gates)

    @torch.no_grad()
    def deterministic(self) -> Gates:
        """Gates without chance: as many as are expected to be closed are 0, those with the lowest log-alpha.

        The others have the mean that they have while open. With the noise as published, as in the authors' code: closed
        ones are counted layer by layer, and the others are σ(0.8·log α / β) (Xia et al. 2022, CoFi).
        """
        if self.fixed is not None:
            return self.fixed
        if self.config.noise_end == 1:
            return Gates(**{kind: self._as_published(la) for kind, la in self.log_alpha.items()})
        gates = {}
        for kind, la in self.log_alpha.items():
            z = hc.mean_open(la, self.config.temperature, self.noise)
            closed = round(float((1 - self._open(la)).sum()))
            if closed:
                z.view(-1)[la.flatten().topk(closed, largest=False).indices] = 0.0
            gates[kind] = z
        return Gates(**gates)

    def _as_published(self, la: Tensor) -> Tensor:
        rows = la.view(-1, la.shape[-1])
        closed = (1 - self._open(rows)).sum(1).round()
        ranks = rows.argsort(dim=1, stable=True).argsort(dim=1)
        z = torch.sigmoid(0.8 * rows / self.config.temperature)
        return z.masked_fill(ranks < closed[:, None], 0.0).view_as(la)

    def expected_sparsity(self) -> Tensor:
        """Expected removed share of the prunable parameters, a scalar differentiable in log-alpha."""
        if self._settled_sparsity is not None:
            return self._settled_sparsity
        return self._sparsity({k: self._open(la) for k, la in self.log_alpha.items()})

    @torch.no_grad()
    def project(self, target: float) -> None:
        """Shift log-alpha so that the expected sparsity is `target`: one shift for all units, found by search.

        Kinds of which the shape keeps the same count in every layer are first shifted layer by layer, so that all
        layers keep the same expected share.
        """
        if self.fixed is not None:
            return
        if self._alike:
            self._level_layers(self._shift_to(target, level=True))
        shift = self._shift_to(target)
        for la in self.log_alpha.values():
            la.add_(shift)

    def _level_layers(self, shift: Tensor) -> None:
        """Give every layer the share of each kind in `_alike` that the model would have on average after `shift`."""
        for kind, la in self.log_alpha.items():
            if kind in self._alike:
                width = self.spec.ffn if kind == "ffn" else la.shape[1]  # each expert is a row of its own
                rows = la.double().view(-1, width)
                wanted = self._open(rows + shift).mean()
                closed = partial(self._closed_in_rows, rows)
                level = _falling_root(closed, -wanted, rows.abs().amax(1) + _MARGIN)
                la.view(-1, width).add_(level[:, None])
            else:
                la.add_(shift)

    def _closed_in_rows(self, rows: Tensor, shifts: Tensor) -> Tensor:
        """Minus the mean probability of being open in rows [N, U] after shifts [..., N]."""
        return -self._open(rows + shifts[..., None]).mean(-1)

    def _shift_to(self, target: float, level: bool = False) -> Tensor:
        """The shift of all log-alphas at which the (falling) expected sparsity equals the target, a scalar."""
        kinds = {kind: la.double() for kind, la in self.log_alpha.items()}
        reach = _MARGIN + torch.stack([la.abs().amax() for la in kinds.values()]).amax()
        return _falling_root(lambda shifts: self._expected_at(kinds, shifts, level), target, reach)

    @property
    def _alike(self) -> set[str]:
        """Gated kinds of which every layer keeps the same count."""
        return _ALIKE[self.config.shape] & set(self.kinds)

    @torch.no_grad()
    def settle(self, target: float, loss: Callable[[list[Gates]], list[float]]) -> Gates:
        """Fix the gates at exactly 0 or 1: the highest log-alphas at the target sparsity, in the configured shape.

        Where the shape can meet the target in several structures, the one with the least loss.

        Args:
            target: sparsity.
            loss: the losses of students with given gates.
        """
        config = self.config
        gates = cheapest_units(self.spec, self.scores(), target, config.shape, Rounding.of(config), loss)
        self.fix(gates)
        return gates

    def fix(self, gates: Gates) -> None:
        """Use `gates` from now on; log-alpha no longer learns."""
        self.fixed = gates.to(next(iter(self.log_alpha.values())).device)
        # On the host: it is asked for at every step, and never changes.
        self._settled_sparsity = self._sparsity({k: (z != 0).double() for k, z in self.fixed.as_dict().items()}).cpu()
        for la in self.log_alpha.values():
            la.requires_grad_(False)
            la.grad = None

    @torch.no_grad()
    def restart(self, log_alpha: dict[str, Tensor]) -> None:
        """Set log-alpha by kind."""
        for kind, value in log_alpha.items():
            self.log_alpha[kind].copy_(value)

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp log-alpha as the paper does beside AdamW (`gates.optimizer=adam`)."""
        if self.config.clamp:
            for la in self.log_alpha.values():
                la.clamp_(-self.config.clamp, self.config.clamp)

    def scores(self) -> dict[str, Tensor]:
        """log-alpha by kind, detached: how much a unit deserves to stay."""
        return {k: la.detach() for k, la in self.log_alpha.items()}

    def _open(self, log_alpha: Tensor) -> Tensor:
        return hc.probability_open(log_alpha, self.config.temperature, self.noise)

    def _sparsity(self, probabilities: dict[str, Tensor]) -> Tensor:
        return 1.0 - self._kept(probabilities) / self.spec.prunable

    def _kept(self, probabilities: dict[str, Tensor]) -> Tensor:
        like = next(iter(probabilities.values()))
        ones = {k: self._one(k, like.device) for k in KINDS if k not in probabilities}
        return kept_parameters(self.spec, {**ones, **{k: p.double() for k, p in probabilities.items()}})

    def _one(self, kind: str, device: torch.device) -> Tensor:
        """Probabilities of a kind that is not gated, made once."""
        ones = self._ones.get((kind, device))
        if ones is None:
            ones = torch.ones(unit_shape(self.spec, kind), dtype=torch.float64, device=device)
            self._ones[kind, device] = ones
        return ones

    def _expected_at(self, kinds: dict[str, Tensor], shifts: Tensor, level: bool) -> Tensor:
        """Expected sparsities after adding each of `shifts` [P] to all log-alphas; `level`: `_alike` ones alike."""
        probabilities = {}
        for kind, la in kinds.items():
            p = self._open(la + shifts.view(-1, *[1] * la.dim()))
            units = tuple(range(1, p.dim()))
            probabilities[kind] = p.mean(units, keepdim=True).expand_as(p) if level and kind in self._alike else p
        return self._sparsity(probabilities)


def _falling_root(value: Callable[[Tensor], Tensor], target: float | Tensor, reach: Tensor) -> Tensor:
    """Where falling functions equal the target, each within ±`reach`, of its shape.

    A fixed number of rounds, each at `_POINTS` places at once: a device is never waited for. The shift of the last step
    was right a step ago, so the first round looks near 0.

    Args:
        value: places [`_POINTS`, …] to the functions' values there.
    """
    reach = reach.double()
    low, high = -reach, reach
    shape = (_POINTS, *[1] * reach.dim())
    points = torch.tensor(_FIRST, dtype=torch.float64, device=reach.device).view(shape).expand(_POINTS, *reach.shape)
    fractions = (torch.arange(1, _POINTS + 1, dtype=torch.float64, device=reach.device) / (_POINTS + 1)).view(shape)
    for _ in range(_ROUNDS):
        before = (value(points) > target).sum(0, keepdim=True)
        ends = torch.cat([low[None], points, high[None]])
        low, high = ends.gather(0, before)[0], ends.gather(0, before + 1)[0]
        points = low + (high - low) * fractions
    return (low + high) / 2
