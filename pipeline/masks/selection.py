"""From scores to a structure: which units stay so that the removed share meets a target exactly.

Used when gates settle to 0/1 during training and when a snapshot is exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import GateConfig, Shape
from nuteprune.errors import UserError
from nuteprune.masks.counts import (
    EXACT,
    TOLERANCE,
    Counts,
    Rounding,
    between,
    every,
    fill,
    grid,
    hidden_step,
    mean_counts,
    midpoints,
    round_to,
    shortlist,
    top,
    whole_counts,
    with_ffn,
)
from nuteprune.masks.gates import Gates, kept_parameters, sparsity_of, unit_shape
from nuteprune.masks.kept import Kept

MEASURED = 12
"""Structures that are measured in a first round, at most."""
BATCHES = 4
"""Training batches on which each is measured."""


def is_measured(config: GateConfig) -> bool:
    """Whether the target can be met in several structures that the shape tells apart, not by scores alone."""
    alike = {"heads", "kv_groups", "hidden"} | ({"layers", "experts"} if config.shape == "uniform" else set())
    return config.shape != "per_layer" and config.settle < 1 and bool(alike & set(config.units))


def select_units(
    spec: ArchSpec, scores: Mapping[str, Tensor], target: float, shape: Shape, rounding: Rounding = EXACT,
    like: Gates | None = None,
) -> Gates:  # fmt: skip
    """0/1 gates that keep the units with the highest scores at the target sparsity.

    Where a shape wants the same counts in every layer, they are those nearest to what the scores alone would keep on
    average, or to what `like` keeps.

    Args:
        spec: the architecture.
        scores: a score for each unit of the kinds that may be removed (comparable across kinds), as in `unit_shape`.
        target: removed share of the prunable parameters.
        shape: "uniform" (the same counts in every layer), "per_layer_ffn" (the same attention in every layer that has
            one, FFN widths free) or "per_layer".
        rounding: to what counts are rounded.
        like: a student whose kind of structure is wanted, at a sparsity of its own.

    Returns:
        `Gates` of float32 zeros and ones for the given kinds.

    Raises:
        ValueError: uniform shape with sublayer scores, which no stock architecture can hold.
        UserError: the tensor-parallel size does not divide the model's KV groups.
    """
    scores = {k: s.detach().double().cpu() for k, s in scores.items()}
    if shape == "uniform" and ({"attn_sublayers", "ffn_sublayers"} & set(scores)):
        raise ValueError("whole sublayers cannot be removed in the uniform shape: use per_layer_ffn or per_layer")
    if shape != "per_layer" and spec.kv_heads % rounding.parallel:
        fitting = ", ".join(str(n) for n in range(1, spec.kv_heads + 1) if spec.kv_heads % n == 0)
        raise UserError(
            f"tensor_parallel {rounding.parallel} does not divide the model's {spec.kv_heads} KV groups: use one of "
            f"{fitting}, or the per_layer shape"
        )
    if shape != "uniform":
        spec = replace(spec, hidden_divides=False)  # no stock configuration holds it
    free = _as_gates(_threshold(spec, scores, target, {}))
    near = mean_counts(Kept.of(spec, free))
    if like is not None and (reached := sparsity_of(spec, like)) > 0:
        near = between(spec, mean_counts(Kept.of(spec, like)), min(1.0, target / reached))
    while True:
        kept = _SHAPES[shape](spec, scores, target, near, rounding)
        missed = abs(_sparsity(spec, kept) - target) > TOLERANCE
        if missed and "hidden" in scores and "ffn" not in scores:
            kept = _with_hidden(spec, scores["hidden"], target, kept, rounding)
            missed = abs(_sparsity(spec, kept) - target) > TOLERANCE
        if "hidden" not in scores or rounding.hidden == 1 or not missed:
            return _as_gates(kept)
        rounding = replace(rounding, hidden=rounding.hidden // 2)


def cheapest_units(
    spec: ArchSpec, scores: Mapping[str, Tensor], target: float, shape: Shape, rounding: Rounding,
    loss: Callable[[list[Gates]], list[float]],
) -> Gates:  # fmt: skip
    """0/1 gates of the structure at the target whose measured loss is least; within a structure scores say which units.

    The same counts in every layer can be met in many ways: fewer KV groups, layers or dimensions, or narrower FFNs. A
    grid of them is measured, those nearest to the scores' own choice first, and then what lies about the best one.

    Args:
        spec, scores, target, shape, rounding: as for `select_units`.
        loss: the losses of models with given gates.
    """
    own = select_units(spec, scores, target, shape, rounding)
    near = whole_counts(Kept.of(spec, own))
    kinds = set(scores)
    if shape != "uniform":  # where FFN widths are free, scores say which layers and experts go
        spec = replace(spec, hidden_divides=False)
        kinds -= {"layers", "experts"}
        near = replace(near, layers=spec.layers, experts=spec.experts)
    possible = {near} | {c for c in grid(spec, kinds, near, target, rounding) if c.reach(spec, target, kinds)}
    if shape == "per_layer" or len(possible) == 1:
        return own
    scores = {k: s.detach().double().cpu() for k, s in scores.items()}
    build = _at_counts if shape == "uniform" else _free_ffn_at
    gates: dict[Counts, Gates] = {near: own}
    losses: dict[Counts, float] = {}

    def measure(wanted: Iterable[Counts]) -> Counts:
        """Measure those that meet the target; the best of all so far."""
        gates.update((c, _as_gates(build(spec, scores, target, c, rounding))) for c in wanted if c not in gates)
        new = [c for c, g in gates.items() if c not in losses and (
            c == near or abs(sparsity_of(spec, g) - target) <= TOLERANCE)]  # fmt: skip
        losses.update(zip(new, loss([gates[c] for c in new]), strict=True))
        return min(losses, key=losses.__getitem__)

    best = measure(shortlist(spec, possible, near, MEASURED))
    return gates[measure(midpoints(spec, kinds, best, possible, rounding))]


def most_removed(spec: ArchSpec, units: list[str], shape: Shape) -> float:
    """The largest sparsity that removing `units` can reach.

    Uniform layers keep one group and one FFN unit each; where attention is alike, its layers keep one group each. Every
    expert keeps a unit. One layer always stays, and as many experts as the router chooses.
    """
    open_ = {}
    alike = shape != "per_layer" and "attn_sublayers" not in units
    for kind in units:
        kept = torch.zeros(unit_shape(spec, kind))
        if kind in ("hidden", "layers"):
            kept[0] = 1
        elif alike and kind == "kv_groups":
            kept[:, 0] = 1
        elif kind == "ffn" and (shape == "uniform" or spec.experts > 1):
            kept[:, :: spec.ffn] = 1
        elif kind == "experts":
            kept[:, : spec.top_k] = 1
        elif alike and kind == "heads":
            kept[:, :: spec.group_size] = 1
        open_[kind] = kept
    if alike and "heads" in units and spec.group_size == 1:
        open_["heads"][:, 1:] = 0
    return sparsity_of(spec, Gates(**open_))


def _threshold(spec: ArchSpec, scores: Mapping, target: float, fixed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep every unit above one common score such that the sparsity is as near to the target as units allow."""
    free = {k: s for k, s in scores.items() if k not in fixed}
    if not free:
        return dict(fixed)
    flat = torch.cat([s.flatten() for s in free.values()])
    # Equal scores, as log-alpha has them at the paper's clamp, leave in an order that spares no layer.
    shuffled = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    order = shuffled[flat[shuffled].argsort(stable=True)]
    rank = order.argsort()
    ranks = {k: r.view_as(free[k]) for k, r in zip(free, rank.split([s.numel() for s in free.values()]), strict=True)}

    def kept(index: int) -> dict[str, Tensor]:
        chosen = {k: (r >= index).double() for k, r in ranks.items()}
        for kind in ("hidden", "layers"):
            if kind in chosen and not chosen[kind].any():
                chosen[kind] = top(scores[kind], 1)
        if "experts" in chosen:
            chosen["experts"] = torch.maximum(chosen["experts"], top(scores["experts"], spec.top_k))
        return {**chosen, **fixed}

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if _sparsity(spec, kept(middle)) < target:
            low = middle + 1
        else:
            high = middle

    def cost(units: dict[str, Tensor]) -> tuple[float, float]:
        # The small FFN units, chosen anew, make up for too little that the others remove, not for too much.
        coarse = _sparsity(spec, {k: z for k, z in units.items() if k != "ffn"}) if "ffn" in free else target
        return max(0.0, coarse - target - TOLERANCE), abs(_sparsity(spec, units) - target)

    return min((kept(i) for i in (low - 1, low) if i >= 0), key=cost)


def _per_layer(
    spec: ArchSpec, scores: Mapping[str, Tensor], target: float, near: Counts, rounding: Rounding
) -> dict[str, Tensor]:
    """All units above one common score; experts of a layer have one width."""
    fixed = {}
    if "hidden" in scores:
        multiple = math.lcm(rounding.hidden, spec.aligned)
        fixed["hidden"] = top(scores["hidden"], round_to(near.hidden, multiple, spec.hidden))
    kept = _threshold(spec, scores, target, fixed)
    # A head or a group at the threshold is a large step; the small FFN units make up for it.
    if "ffn" not in scores:
        return kept
    coarse = {k: v for k, v in kept.items() if k != "ffn"}
    if spec.experts > 1:
        return _ffn_blocks(spec, scores["ffn"], target, coarse, EXACT)
    return _threshold(spec, scores, target, coarse)


def _uniform(
    spec: ArchSpec, scores: Mapping[str, Tensor], target: float, near: Counts, rounding: Rounding
) -> dict[str, Tensor]:
    """The uniform structure nearest to some counts and within reach of the target."""

    def cost(counts: Counts) -> tuple:
        miss = abs(counts.sparsity(spec) - target)
        return max(0.0, miss - TOLERANCE), counts.distance(near, spec), miss

    possible = every(spec, scores, near, rounding)
    if "ffn" in scores:
        possible = [with_ffn(spec, counts, target, rounding) for counts in possible]
    return fill(spec, scores, min(possible, key=cost))


def _at_counts(
    spec: ArchSpec, scores: Mapping[str, Tensor], target: float, counts: Counts, rounding: Rounding
) -> dict[str, Tensor]:
    """The uniform structure with these counts, its FFN width as the target wants."""
    return fill(spec, scores, with_ffn(spec, counts, target, rounding) if "ffn" in scores else counts)


def _free_ffn(
    spec: ArchSpec, scores: Mapping[str, Tensor], target: float, near: Counts, rounding: Rounding
) -> dict[str, Tensor]:
    """Attention alike in every layer, as near to some counts as the target allows; FFN widths free."""
    found: list[tuple[float, int, dict[str, Tensor]]] = []
    possible = every(spec, set(scores) - {"layers", "experts"}, near, rounding)
    for counts in sorted(possible, key=lambda c: c.distance(near, spec)):
        kept = _free_ffn_at(spec, scores, target, counts, rounding)
        miss = abs(_sparsity(spec, kept) - target)
        if miss <= TOLERANCE:
            return kept
        found.append((miss, len(found), kept))
    return min(found)[-1]


def _free_ffn_at(
    spec: ArchSpec, scores: Mapping[str, Tensor], target: float, counts: Counts, rounding: Rounding
) -> dict[str, Tensor]:
    """The structure with this attention and hidden size; FFN widths, experts, sublayers and layers by score."""
    free = ("ffn", "layers", "experts")
    alike = fill(spec, {kind: s for kind, s in scores.items() if kind not in free}, counts)
    kept = _threshold(spec, scores, target, alike)
    if "ffn" not in scores:
        return kept
    return _ffn_blocks(spec, scores["ffn"], target, {k: v for k, v in kept.items() if k != "ffn"}, rounding)


def _with_hidden(
    spec: ArchSpec, scores: Tensor, target: float, kept: dict[str, Tensor], rounding: Rounding
) -> dict[str, Tensor]:
    """The same structure with the hidden size that brings it nearest to the target, where no FFN units can do that."""
    none, whole = (_sparsity(spec, {**kept, "hidden": torch.full_like(scores, share)}) for share in (0.0, 1.0))
    if none == whole:  # nothing else is left
        return kept
    heads = max(1, *map(len, Kept.of(spec, _as_gates(kept)).heads))
    size = round_to(spec.hidden * (none - target) / (none - whole), hidden_step(spec, heads, rounding), spec.hidden)
    fits = not spec.hidden_divides or size % heads == 0
    return {**kept, "hidden": top(scores, size)} if fits else kept


_SHAPES = {"uniform": _uniform, "per_layer_ffn": _free_ffn, "per_layer": _per_layer}


def _ffn_blocks(
    spec: ArchSpec, scores: Tensor, target: float, fixed: dict[str, Tensor], rounding: Rounding
) -> dict[str, Tensor]:
    """FFN units beside what is `fixed`, in whole blocks of the multiple: those with the highest sum of scores.

    A layer's units are cut into blocks from its best unit down, so that any number of blocks is a width. As many blocks
    stay as bring the sparsity nearest to the target, whichever layers they are in; a layer may keep none. Experts of a
    layer have one width: a block is as many units of each of them, and one always stays.
    """
    per_unit = float(spec.ffn_cost(fixed["hidden"].sum() if "hidden" in fixed else spec.hidden))
    none_left = {**fixed, "ffn": torch.zeros_like(scores)}
    wanted = (_sparsity(spec, none_left) - target) * spec.prunable / per_unit
    alive = fixed.get("ffn_sublayers", torch.ones(spec.layers)) * fixed.get("layers", torch.ones(spec.layers))
    experts = fixed.get("experts", torch.ones(spec.layers, spec.experts)).to(scores.dtype)
    multiple, parallel = rounding.ffn, rounding.parallel
    while True:
        size = math.lcm(multiple, parallel, spec.aligned)
        kept = {**fixed, "ffn": _best_blocks(scores, alive, experts, wanted, size, parallel)}
        if multiple == 1 or abs(_sparsity(spec, kept) - target) <= TOLERANCE:
            return kept
        multiple //= 2


def _best_blocks(
    scores: Tensor, alive: Tensor, experts: Tensor, wanted: float, size: int, parallel: int
) -> Tensor:  # fmt: skip
    """[L, E·F] ones at the best blocks of `size` units, with about `wanted` units in all of them.

    What is left of a width that is no multiple is a block of its own, the layer's last, if GPUs can share it.
    A block is ranked by the mean score of its units in the experts [L, E] that stay.
    """
    each = scores.unflatten(1, (experts.shape[1], -1))
    layers, count, width = each.shape
    sizes = [size] * (width // size) + ([width % size] if width % size and width % parallel == 0 else [])
    if not sizes:
        return torch.zeros_like(scores)
    order = each.argsort(dim=-1, descending=True, stable=True)
    in_order = (each.gather(-1, order) * experts[..., None]).sum(1) / experts.sum(1, keepdim=True)
    means = torch.stack([part.mean(1) for part in in_order[:, : sum(sizes)].split(sizes, 1)], 1)
    if count > 1:
        means[:, 0] = math.inf
    means = means.masked_fill(alive[:, None] == 0, -math.inf)
    # A stable sort keeps a layer's blocks in order where they are alike, so that its best ones are taken first.
    ranked = means.flatten().argsort(descending=True, stable=True)
    ranked = ranked[means.flatten()[ranked] > -math.inf]
    units = torch.tensor(sizes, dtype=torch.float64) * experts.double().sum(1, keepdim=True)
    totals = units.flatten()[ranked].cumsum(0)
    nearest = int((torch.cat([totals.new_zeros(1), totals]) - wanted).abs().argmin())
    blocks = torch.zeros(means.numel(), dtype=torch.long)
    blocks[ranked[: max(nearest, int(means.isposinf().sum()))]] = 1
    widths = (blocks.view(layers, -1) * torch.tensor(sizes)).sum(1)
    chosen = (torch.arange(width) < widths[:, None, None]).to(scores.dtype)
    return torch.zeros_like(each).scatter_(-1, order, chosen.expand(-1, count, -1)).flatten(1)


def _sparsity(spec: ArchSpec, kept: Mapping[str, Tensor]) -> float:
    open_ = _as_gates(kept, torch.float64).full(spec).as_dict()
    return 1.0 - float(kept_parameters(spec, open_)) / spec.prunable


def _as_gates(kept: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Gates:
    return Gates(**{k: v.to(dtype) for k, v in kept.items()})
