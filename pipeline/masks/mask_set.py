"""The learned gates of one run: log-alpha by kind, sampling, the constraint by projection, settling to 0/1."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from nuteprune.arch import ArchSpec
from nuteprune.config import ConfigError, GateConfig
from nuteprune.masks import hard_concrete as hc
from nuteprune.masks.gates import KINDS, Gates, kept_parameters, sparsity_of, unit_shape
from nuteprune.masks.selection import most_removed, select_units

POINT = 0.01
"""The exported sparsity may be this far from the target."""
_MARGIN = 60.0
"""How far beyond the spread of log-alpha the projection looks for its shift."""
_SHIFT_EPS = 1e-8
"""Width at which its bisection ends."""
_ALIKE = {"uniform": {"heads", "kv_groups", "ffn"}, "per_layer_ffn": {"heads", "kv_groups"}, "per_layer": set()}
"""By shape, the kinds of which every layer keeps the same count."""


def gated_kinds(spec: ArchSpec, units: list[str]) -> list[str]:
    """The kinds that get gates: without grouped queries a head is its own KV group, so one gate serves both."""
    kinds = [k for k in KINDS if k in units]
    if spec.group_size == 1 and "heads" in kinds and "kv_groups" in kinds:
        kinds.remove("kv_groups")
    return kinds


def multiples(config: GateConfig) -> tuple[int, int, int]:
    """Multiples of the FFN width and the hidden size, and the tensor-parallel size."""
    return config.ffn_multiple, config.hidden_multiple, config.tensor_parallel


def check_target(spec: ArchSpec, config: GateConfig, target: float) -> None:
    """Raise `ConfigError` if the selected units cannot reach the target, or cannot be removed in the shape asked."""
    if config.shape == "uniform" and {"attn_sublayers", "ffn_sublayers"} & set(config.units):
        raise ConfigError(
            "gates.units: whole sublayers need gates.shape=per_layer_ffn or per_layer (no stock model lacks a sublayer)"
        )
    kinds = gated_kinds(spec, config.units)
    most = most_removed(spec, kinds, config.shape)
    if target > most:
        raise ConfigError(
            f"sparsity.target {target:g} is out of reach: removing {', '.join(config.units)} takes away at most "
            f"{most:.3f} of this model; add units to gates.units or lower the target"
        )
    generator = torch.Generator().manual_seed(0)
    scores = {k: torch.rand(unit_shape(spec, k), generator=generator) for k in kinds}
    nearest = sparsity_of(spec, select_units(spec, scores, target, config.shape, *multiples(config)))
    if abs(nearest - target) > POINT:
        raise ConfigError(
            f"sparsity.target {target:g}: {', '.join(config.units)} are so coarse in the {config.shape} shape that the "
            f"nearest reachable sparsity is {nearest:.3f}; use that, or add ffn to gates.units"
        )


class MaskSet(nn.Module):
    """Hard-concrete gates of a model.

    Args:
        spec: the architecture.
        config: which units, temperature, initial drop rate, clamp, shape.

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
        start = math.log(1 - config.init_drop_rate) - math.log(config.init_drop_rate)
        self.log_alpha = nn.ParameterDict(
            {k: nn.Parameter(start + 0.01 * torch.randn(unit_shape(spec, k))) for k in self.kinds}
        )
        self.fixed: Gates | None = None
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
        if self.fixed is not None:
            probabilities = {k: (z != 0).double() for k, z in self.fixed.as_dict().items()}
        else:
            probabilities = {k: self._open(la) for k, la in self.log_alpha.items()}
        return 1.0 - self._kept(probabilities) / self.spec.prunable

    @torch.no_grad()
    def project(self, target: float) -> None:
        """Shift log-alpha so that the expected sparsity is `target`: one shift for all units, found by bisection.

        Kinds of which the shape keeps the same count in every layer are first shifted layer by layer, so that all
        layers keep the same expected share.
        """
        if self.fixed is not None:
            return
        if self._alike:
            self._level_layers(self._bisect(partial(self._expected_at, level=True), target))
        shift = self._bisect(self._expected_at, target)
        for la in self.log_alpha.values():
            la.add_(shift)

    def _level_layers(self, shift: float) -> None:
        """Give every layer the share of each kind in `_alike` that the model would have on average after `shift`."""
        for kind, la in self.log_alpha.items():
            if kind in self._alike:
                wanted = self._open(la.double() + shift).mean()
                la.add_(_bisect_rows(self._open, la.double(), wanted)[:, None])
            else:
                la.add_(shift)

    def _bisect(self, expected_sparsity: Callable[[float], float], target: float) -> float:
        """The shift at which the (falling) expected sparsity equals the target."""
        most = _MARGIN + max(float(la.abs().max()) for la in self.log_alpha.values())
        # The last step's shift was right a step ago, so the new one is near 0: look there first.
        high = 0.1
        while high < most and not expected_sparsity(high) <= target <= expected_sparsity(-high):
            high *= 4
        low = -high
        while high - low > _SHIFT_EPS * max(1.0, high):
            middle = (low + high) / 2
            if expected_sparsity(middle) > target:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    @property
    def _alike(self) -> set[str]:
        """Gated kinds of which every layer keeps the same count."""
        return _ALIKE[self.config.shape] & set(self.kinds)

    @torch.no_grad()
    def settle(self, target: float) -> None:
        """Fix the gates at exactly 0 or 1: the highest log-alphas at the target sparsity, in the configured shape."""
        gates = select_units(self.spec, self.scores(), target, self.config.shape, *multiples(self.config))
        self.fix(gates)

    def fix(self, gates: Gates) -> None:
        """Use `gates` from now on; log-alpha no longer learns."""
        self.fixed = gates.to(next(iter(self.log_alpha.values())).device)
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
        """Clamp log-alpha to ±`gates.clamp` if that is set (the paper: log 100)."""
        if self.config.clamp:
            for la in self.log_alpha.values():
                la.clamp_(-self.config.clamp, self.config.clamp)

    def scores(self) -> dict[str, Tensor]:
        """log-alpha by kind, detached: how much a unit deserves to stay."""
        return {k: la.detach() for k, la in self.log_alpha.items()}

    def _open(self, log_alpha: Tensor) -> Tensor:
        return hc.probability_open(log_alpha, self.config.temperature, self.noise)

    def _kept(self, probabilities: dict[str, Tensor]) -> Tensor:
        like = next(iter(probabilities.values()))
        ones = {k: like.new_ones(unit_shape(self.spec, k), dtype=torch.float64) for k in KINDS}
        return kept_parameters(self.spec, {**ones, **{k: p.double() for k, p in probabilities.items()}})

    def _expected_at(self, shift: float, level: bool = False) -> float:
        """Expected sparsity after adding `shift` to every log-alpha; `level`: `_alike` with all layers alike."""
        probabilities = {}
        for kind, la in self.log_alpha.items():
            p = self._open(la.double() + shift)
            probabilities[kind] = p.mean().expand_as(p) if level and kind in self._alike else p
        return 1.0 - float(self._kept(probabilities)) / self.spec.prunable


def _bisect_rows(open_probability, rows: Tensor, wanted: Tensor) -> Tensor:
    """[L] shifts at which each row's mean probability equals `wanted`."""
    high = rows.abs().amax(1) + _MARGIN
    low = -high
    for _ in range(60):
        middle = (low + high) / 2
        short = open_probability(rows + middle[:, None]).mean(1) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (low + high) / 2
