"""How many units of each kind every layer keeps, where a shape wants the same number in all of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product

import torch
from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import GateConfig
from nuteprune.errors import UserError
from nuteprune.masks.kept import Kept

TOLERANCE = 0.009
"""Largest distance from the target that rounding to multiples may cause before the multiple is halved."""
STEPS = 3
"""Steps in which a grid of counts goes from all units of a kind to what would meet the target by that kind alone."""


@dataclass(frozen=True)
class Counts:
    """KV groups a layer, query heads a group, hidden dimensions, decoder layers, experts a layer, FFN units of each."""

    groups: float
    heads: float
    hidden: float
    layers: float
    experts: float
    ffn: float

    def __str__(self) -> str:
        experts = f"{self.experts:g} experts of " if self.experts != 1 else ""
        return (
            f"{self.layers:g} layers of {self.groups:g} x {self.heads:g} heads and {experts}{self.ffn:g} FFN units, "
            f"hidden size {self.hidden:g}"
        )

    def distance(self, other: Counts, spec: ArchSpec) -> float:
        """Sum over all but the FFN, which makes up for the others, of the differences as shares of the intact model."""
        pairs = zip(astuple(self)[:-1], astuple(other)[:-1], astuple(intact(spec))[:-1], strict=True)
        return sum(abs(a - b) / whole for a, b, whole in pairs)

    def reach(self, spec: ArchSpec, target: float, kinds: Collection[str]) -> bool:
        """Whether some FFN width brings the sparsity to the target, where FFN units may be removed."""
        least = replace(self, ffn=spec.ffn).sparsity(spec) - TOLERANCE
        most = replace(self, ffn=0 if "ffn" in kinds else spec.ffn).sparsity(spec) + TOLERANCE
        return least <= target <= most

    def sparsity(self, spec: ArchSpec) -> float:
        """Removed share of the prunable parameters."""
        attention = self.groups * (self.heads * spec.head_cost(self.hidden) + spec.group_cost(self.hidden))
        ffn = self.experts * self.ffn * spec.ffn_cost(self.hidden)
        return 1 - self.layers * (attention + ffn) / spec.prunable


@dataclass(frozen=True)
class Rounding:
    """Multiples of the FFN width and the hidden size, halved where the target would be missed by more than `TOLERANCE`.

    KV groups and FFN widths are multiples of `parallel`, the tensor-parallel size, which is never halved. FFN widths
    and groups are free in the per_layer shape.
    """

    ffn: int = 1
    hidden: int = 1
    parallel: int = 1

    @classmethod
    def of(cls, gates: GateConfig) -> Rounding:
        """As the settings have it."""
        return cls(gates.ffn_multiple, gates.hidden_multiple, gates.tensor_parallel)


EXACT = Rounding()
"""Any count is allowed."""


def intact(spec: ArchSpec) -> Counts:
    """All there is."""
    return Counts(spec.kv_heads, spec.group_size, spec.hidden, spec.layers, spec.experts, spec.ffn)


def mean_counts(kept: Kept) -> Counts:
    """What the layers that stay keep on average."""
    heads, groups = int(kept.heads_LKG.sum()), int(kept.heads_LKG.any(2).sum())
    layers, attention = int(kept.layers_L.sum()), int(kept.attention_L.sum())
    experts, units = int(kept.experts_LE[kept.layers_L].sum()), int(kept.ffn_LEF.sum())
    return Counts(
        groups / max(1, attention), heads / max(1, groups), float(kept.hidden_D.sum()), float(layers),
        experts / max(1, layers), units / max(1, experts),
    )  # fmt: skip


def whole_counts(kept: Kept) -> Counts:
    """The counts of a structure that is alike in all layers, as whole numbers and with the FFN left open."""
    return replace(Counts(*map(round, astuple(mean_counts(kept)))), ffn=kept.spec.ffn)


def between(spec: ArchSpec, counts: Counts, share: float) -> Counts:
    """The counts on the way from the intact model (share 0) to `counts` (1)."""
    pairs = zip(astuple(intact(spec)), astuple(counts), strict=True)
    return Counts(*(whole + (kept - whole) * share for whole, kept in pairs))


def every(spec: ArchSpec, kinds: Collection[str], near: Counts, rounding: Rounding) -> list[Counts]:
    """All numbers of groups, heads and layers, with the hidden sizes about that of `near`; FFN whole."""
    hidden = [near.hidden + i * rounding.hidden for i in (-1, 0, 1)]
    axes = (range(1, spec.kv_heads + 1), range(1, spec.group_size + 1), hidden, range(1, spec.layers + 1),
            range(spec.top_k, spec.experts + 1))  # fmt: skip
    found = _product(spec, kinds, axes, rounding)
    if not found:
        raise UserError(
            f"{spec.family} wants a hidden size that its heads divide, and none near by is: leave hidden out of "
            "gates.units, or add heads"
        )
    return found


def grid(spec: ArchSpec, kinds: Collection[str], near: Counts, target: float, rounding: Rounding) -> list[Counts]:
    """A few numbers of each kind, from all to as few as would meet the target by themselves, and those of `near`."""
    shares = [1 - target * step / STEPS for step in range(STEPS + 1)]
    wholes, own = astuple(intact(spec))[:-1], astuple(near)[:-1]
    axes = [[*(whole * share for share in shares), mean] for whole, mean in zip(wholes, own, strict=True)]
    return _product(spec, kinds, axes, rounding)


def _product(spec: ArchSpec, kinds: Collection[str], axes, rounding: Rounding) -> list[Counts]:
    """Every combination of the values of the axes whose kind may be removed, rounded to what the shape allows."""
    groups, heads, hidden, layers, experts = axes
    experts = [max(count, spec.top_k) for count in experts]  # the router chooses so many
    # With one query head a group (no grouped queries) head gates decide the groups.
    groups_free = "kv_groups" in kinds or ("heads" in kinds and spec.group_size == 1)

    def rounded(axis: Sequence[float], free: bool, multiple: int, most: int) -> list[int]:
        return sorted({round_to(value, multiple, most) for value in axis}) if free else [most]

    def sizes(heads: int) -> list[int]:
        return rounded(hidden, "hidden" in kinds, hidden_step(spec, heads, rounding), spec.hidden)

    found = [
        Counts(*attention, size, *others, spec.ffn)
        for attention in product(rounded(groups, groups_free, rounding.parallel, spec.kv_heads),
                                 rounded(heads, "heads" in kinds, 1, spec.group_size))
        for size in sizes(math.prod(attention))
        for others in product(rounded(layers, "layers" in kinds, 1, spec.layers),
                              rounded(experts, "experts" in kinds, 1, spec.experts))
    ]  # fmt: skip
    if spec.hidden_divides:  # its stock configuration refuses other sizes, but for those it has
        own = astuple(intact(spec))[:3]
        found = [c for c in found if c.hidden % (c.groups * c.heads) == 0 or astuple(c)[:3] == own]
    return found


def hidden_step(spec: ArchSpec, heads: int, rounding: Rounding) -> int:
    """Of what the hidden size is a multiple, with so many query heads a layer."""
    return math.lcm(rounding.hidden, spec.aligned, heads if spec.hidden_divides else 1)


def shortlist(spec: ArchSpec, possible: Collection[Counts], near: Counts, most: int) -> list[Counts]:
    """At most so many of them: the nearest to `near`, and of every number of a kind the nearest that has it."""
    ranked = sorted(possible, key=lambda c: (c.distance(near, spec), astuple(c)))
    seen: set[tuple[int, float]] = set()
    first = []
    for counts in ranked:
        if not seen.issuperset(enumerate(astuple(counts))):
            first.append(counts)
            seen.update(enumerate(astuple(counts)))
    return [*first, *(c for c in ranked if c not in first)][:most]


def midpoints(
    spec: ArchSpec, kinds: Collection[str], best: Counts, possible: Collection[Counts], rounding: Rounding
) -> list[Counts]:
    """Halfway from `best` to the next number of each kind among the possible ones, up and down."""
    found = set()
    kinds_alike = ("groups", "heads", "hidden", "layers", "experts")
    for kind in kinds_alike:
        here = getattr(best, kind)
        values = {getattr(c, kind) for c in possible}
        for nearest in (max((v for v in values if v < here), default=None), min((v for v in values if v > here),
                                                                                  default=None)):  # fmt: skip
            if nearest is not None:
                found.update(
                    _product(
                        spec,
                        kinds,
                        [[getattr(best, k) if k != kind else (here + nearest) / 2] for k in kinds_alike],
                        rounding,
                    )
                )
    return sorted(found - {best}, key=astuple)


def with_ffn(spec: ArchSpec, counts: Counts, target: float, rounding: Rounding) -> Counts:
    """The counts with the FFN width that brings them nearest to the target, as a multiple where it fits."""
    exact = (
        (replace(counts, ffn=0).sparsity(spec) - target)
        * spec.prunable
        / (counts.layers * counts.experts * spec.ffn_cost(counts.hidden))
    )
    multiple = rounding.ffn
    while True:
        width = round_to(exact, math.lcm(multiple, rounding.parallel, spec.aligned), spec.ffn)
        found = replace(counts, ffn=width)
        if multiple == 1 or abs(found.sparsity(spec) - target) <= TOLERANCE:
            return found
        multiple //= 2


def fill(spec: ArchSpec, scores: Mapping[str, Tensor], counts: Counts) -> dict[str, Tensor]:
    """The best units by count: groups, heads in them, experts and FFN units of every layer, dimensions, and layers."""
    kept = {}
    for kind, count in (("hidden", counts.hidden), ("layers", counts.layers), ("experts", counts.experts)):
        if kind in scores:
            kept[kind] = top(scores[kind], count)
    if "ffn" in scores:
        kept["ffn"] = top(scores["ffn"].unflatten(1, (spec.experts, spec.ffn)), counts.ffn).flatten(1)
    if "heads" in scores:
        in_group = scores["heads"].unflatten(1, (spec.kv_heads, spec.group_size))
        kept_heads = top(in_group, counts.heads)
        group_score = scores["kv_groups"] if "kv_groups" in scores else in_group.amax(-1)
        kept_groups = top(group_score, counts.groups)
        kept["heads"] = (kept_heads * kept_groups[..., None]).flatten(1)
        if "kv_groups" in scores:
            kept["kv_groups"] = kept_groups
    elif "kv_groups" in scores:
        kept["kv_groups"] = top(scores["kv_groups"], counts.groups)
    return kept


def top(scores: Tensor, count: float) -> Tensor:
    """Ones at the `count` (a whole number) highest scores along the last dimension, zeros elsewhere."""
    kept = torch.zeros_like(scores, dtype=torch.float64)
    return kept.scatter_(-1, scores.topk(int(count), dim=-1).indices, 1.0)


def round_to(count: float, multiple: int, most: int) -> int:
    """`count` to the nearest multiple, at least one of it and at most `most` (which always is allowed)."""
    return min(max(round(count / multiple) * multiple, min(multiple, most)), most)
