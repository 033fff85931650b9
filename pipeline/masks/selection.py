"""From scores to a structure: which units stay so that the removed share meets a target exactly.

Used when gates settle to 0/1 during training and when a snapshot is exported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import ConfigError
from nuteprune.masks.gates import Gates, kept_parameters, sparsity_of, unit_shape

TOLERANCE = 0.009
"""Largest distance from the target that rounding to multiples may cause before the multiple is halved."""


def select_units(
    spec: ArchSpec, scores: Mapping[str, Tensor], target: float, shape: str, ffn_multiple: int = 1,
    hidden_multiple: int = 1, tensor_parallel: int = 1,
) -> Gates:  # fmt: skip
    """0/1 gates that keep the units with the highest scores at the target sparsity.

    Args:
        spec: the architecture.
        scores: a score for each unit of the kinds that may be removed (comparable across kinds), as in `unit_shape`.
        target: removed share of the prunable parameters.
        shape: "uniform" (the same counts in every layer), "per_layer_ffn" (the same attention in every layer that has
            one, FFN widths free) or "per_layer".
        ffn_multiple, hidden_multiple: counts are rounded to these, halved while the target would be missed by more
            than `TOLERANCE`; FFN widths not in the per_layer shape.
        tensor_parallel: KV groups and FFN widths are multiples of this, which is never halved; not in the per_layer
            shape.

    Returns:
        `Gates` of float32 zeros and ones for the given kinds.

    Raises:
        ValueError: uniform shape with sublayer scores, which no stock architecture can hold.
        ConfigError: the tensor-parallel size does not divide the model's KV groups.
    """
    scores = {k: s.detach().double().cpu() for k, s in scores.items()}
    if shape == "uniform" and ({"attn_sublayers", "ffn_sublayers"} & set(scores)):
        raise ValueError("whole sublayers cannot be removed in the uniform shape: use per_layer_ffn or per_layer")
    if shape != "per_layer" and spec.kv_heads % tensor_parallel:
        raise ConfigError(f"tensor_parallel {tensor_parallel} does not divide the model's {spec.kv_heads} KV groups")
    while True:
        gates = _select(spec, scores, target, shape, ffn_multiple, hidden_multiple, tensor_parallel)
        missed = abs(sparsity_of(spec, gates) - target) > TOLERANCE
        if "hidden" not in scores or hidden_multiple == 1 or not missed:
            return gates
        hidden_multiple //= 2


def _select(spec, scores, target, shape, ffn_multiple, hidden_multiple, tensor_parallel) -> Gates:
    wanted = _threshold(spec, scores, target, {})
    fixed = {}
    if "hidden" in scores:
        count = _round(int(wanted["hidden"].sum()), hidden_multiple, spec.hidden)
        fixed["hidden"] = _top(scores["hidden"], count)
    if shape == "per_layer":
        kept = _threshold(spec, scores, target, fixed)
        # A head or a group at the threshold is a large step; the small FFN units make up for it.
        coarse = {k: v for k, v in kept.items() if k != "ffn"}
        return _as_gates(_threshold(spec, scores, target, coarse) if "ffn" in scores else kept)
    choose = _uniform if shape == "uniform" else _free_ffn
    return _as_gates(choose(spec, scores, target, wanted, ffn_multiple, hidden_multiple, tensor_parallel))


def most_removed(spec: ArchSpec, units: list[str], shape: str) -> float:
    """The largest sparsity that removing `units` can reach.

    Uniform layers keep one group and one FFN unit each; where attention is alike, its layers keep one group each.
    """
    open_ = {}
    alike = shape != "per_layer" and "attn_sublayers" not in units
    for kind in units:
        kept = torch.zeros(unit_shape(spec, kind))
        if kind == "hidden":
            kept[0] = 1
        elif (alike and kind == "kv_groups") or (shape == "uniform" and kind == "ffn"):
            kept[:, 0] = 1
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
    order = torch.cat([s.flatten() for s in free.values()]).sort().values

    def kept(index: int) -> dict[str, Tensor]:
        limit = order[index - 1] if index else order[0] - 1
        chosen = {k: (s > limit).double() for k, s in free.items()}
        if "hidden" in chosen and not chosen["hidden"].any():
            chosen["hidden"] = _top(scores["hidden"], 1)
        return {**chosen, **fixed}

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if _sparsity(spec, kept(middle)) < target:
            low = middle + 1
        else:
            high = middle
    near = min((i for i in (low - 1, low) if i >= 0), key=lambda i: abs(_sparsity(spec, kept(i)) - target))
    return kept(near)


def _uniform(spec, scores, target, wanted, ffn_multiple, hidden_multiple, tensor_parallel) -> dict[str, Tensor]:
    """The uniform structure nearest to the counts that `wanted` has on average and within reach of the target."""
    candidates = []
    for change, (k, q, d) in _alike(spec, scores, wanted, hidden_multiple, tensor_parallel):
        f = _ffn_width(spec, k, q, d, target, ffn_multiple, tensor_parallel) if "ffn" in scores else spec.ffn
        miss = abs(_uniform_sparsity(spec, k, q, d, f) - target)
        candidates.append((max(0.0, miss - TOLERANCE), change, miss, (k, q, d, f)))
    k, q, d, f = min(candidates)[-1]
    return _fill(spec, scores, k, q, d, f)


def _free_ffn(spec, scores, target, wanted, ffn_multiple, hidden_multiple, tensor_parallel) -> dict[str, Tensor]:
    """Attention alike in every layer, as near to what `wanted` has on average as the target allows; FFN widths free."""
    found = []
    for _, (k, q, d) in sorted(_alike(spec, scores, wanted, hidden_multiple, tensor_parallel)):
        filled = _fill(spec, {kind: s for kind, s in scores.items() if kind != "ffn"}, k, q, d, spec.ffn)
        kept = _threshold(spec, scores, target, filled)
        if "ffn" in scores:
            coarse = {kind: units for kind, units in kept.items() if kind != "ffn"}
            kept = _ffn_blocks(spec, scores["ffn"], target, coarse, ffn_multiple, tensor_parallel)
        miss = abs(_sparsity(spec, kept) - target)
        if miss <= TOLERANCE:
            return kept
        found.append((miss, len(found), kept))
    return min(found)[-1]


def _alike(spec, scores, wanted, hidden_multiple, tensor_parallel) -> list[tuple[float, tuple[int, int, int]]]:
    """Possible (KV groups, query heads a group, hidden size), alike in every layer that has attention.

    Each with its distance from the counts that `wanted` has on average.
    """
    alive = _group_view(spec, wanted)
    layers = float(wanted["attn_sublayers"].sum()) if "attn_sublayers" in wanted else spec.layers
    mean_groups = float(alive.any(-1).double().sum() / max(1.0, layers))
    mean_heads = float(alive.double().sum() / alive.any(-1).double().sum().clamp(min=1))
    # With one query head a group (no grouped queries) head gates decide the groups.
    groups_free = "kv_groups" in scores or ("heads" in scores and spec.group_size == 1)
    groups = range(tensor_parallel, spec.kv_heads + 1, tensor_parallel) if groups_free else [spec.kv_heads]
    heads = range(1, spec.group_size + 1) if "heads" in scores else [spec.group_size]
    count_hidden = int(wanted["hidden"].sum()) if "hidden" in wanted else spec.hidden
    hidden = {_round(count_hidden + i * hidden_multiple, hidden_multiple, spec.hidden) for i in (-1, 0, 1)}
    found = []
    for k, q, d in product(groups, heads, sorted(hidden) if "hidden" in scores else [spec.hidden]):
        change = abs(k - mean_groups) / spec.kv_heads + abs(q - mean_heads) / spec.group_size
        found.append((change + abs(d - count_hidden) / spec.hidden, (k, q, d)))
    return found


def _ffn_blocks(spec, scores: Tensor, target: float, fixed: dict, multiple: int, parallel: int) -> dict[str, Tensor]:
    """FFN units beside what is `fixed`, in whole blocks of the multiple: those with the highest sum of scores.

    A layer's units are cut into blocks from its best unit down, so that any number of blocks is a width. As many blocks
    stay as bring the sparsity nearest to the target, whichever layers they are in; a layer may keep none.
    """
    per_unit = float(spec.ffn_cost(fixed["hidden"].sum() if "hidden" in fixed else spec.hidden))
    none_left = {**fixed, "ffn": torch.zeros_like(scores)}
    wanted = (_sparsity(spec, none_left) - target) * spec.prunable / per_unit
    while True:
        kept = {**fixed, "ffn": _best_blocks(scores, fixed.get("ffn_sublayers"), wanted, math.lcm(multiple, parallel),
                                             parallel)}  # fmt: skip
        if multiple == 1 or abs(_sparsity(spec, kept) - target) <= TOLERANCE:
            return kept
        multiple //= 2


def _best_blocks(scores: Tensor, alive: Tensor | None, wanted: float, size: int, parallel: int) -> Tensor:
    """[L, F] ones at the best blocks of `size` units, with about `wanted` units in all of them.

    What is left of a width that is no multiple is a block of its own, the layer's last, if GPUs can share it.
    """
    layers, width = scores.shape
    sizes = [size] * (width // size) + ([width % size] if width % size and width % parallel == 0 else [])
    if not sizes:
        return torch.zeros_like(scores)
    order = scores.argsort(dim=1, descending=True, stable=True)
    means = torch.stack([part.mean(1) for part in scores.gather(1, order)[:, : sum(sizes)].split(sizes, 1)], 1)
    if alive is not None:
        means = means.masked_fill(alive[:, None] == 0, -math.inf)
    # A stable sort keeps a layer's blocks in order where they are alike, so that its best ones are taken first.
    ranked = means.flatten().argsort(descending=True, stable=True)
    ranked = ranked[means.flatten()[ranked] > -math.inf]
    totals = torch.tensor([0.0, *sizes], dtype=torch.float64)[1 + ranked % len(sizes)].cumsum(0)
    count = int((torch.cat([totals.new_zeros(1), totals]) - wanted).abs().argmin())
    blocks = torch.zeros(means.numel(), dtype=torch.long)
    blocks[ranked[:count]] = 1
    widths = (blocks.view(layers, -1) * torch.tensor(sizes)).sum(1)
    return torch.zeros_like(scores).scatter_(1, order, (torch.arange(width) < widths[:, None]).to(scores.dtype))


def _ffn_width(spec: ArchSpec, k: int, q: int, d: int, target: float, multiple: int, parallel: int) -> int:
    """FFN units a layer may keep beside k groups of q heads and d hidden dimensions, as a multiple where it fits."""
    attention = k * q * spec.head_cost(d) + k * spec.group_cost(d)
    exact = ((1 - target) * spec.prunable / spec.layers - attention) / spec.ffn_cost(d)
    while True:
        unit = math.lcm(multiple, parallel)
        width = _round(round(exact), unit, spec.ffn, round(exact / unit) * unit)
        if multiple == 1 or abs(_uniform_sparsity(spec, k, q, d, width) - target) <= TOLERANCE:
            return width
        multiple //= 2


def _uniform_sparsity(spec: ArchSpec, k: int, q: int, d: int, f: int) -> float:
    kept = k * q * spec.head_cost(d) + k * spec.group_cost(d) + f * spec.ffn_cost(d)
    return 1 - spec.layers * kept / spec.prunable


def _fill(spec: ArchSpec, scores: Mapping, k: int, q: int, d: int, f: int) -> dict[str, Tensor]:
    """The best k groups of q heads, f FFN units of every layer, and d hidden dimensions."""
    kept = {}
    if "hidden" in scores:
        kept["hidden"] = _top(scores["hidden"], d)
    if "ffn" in scores:
        kept["ffn"] = _top(scores["ffn"], f)
    if "heads" in scores:
        in_group = scores["heads"].unflatten(1, (spec.kv_heads, spec.group_size))
        kept_heads = _top(in_group, q)
        group_score = scores["kv_groups"] if "kv_groups" in scores else in_group.amax(-1)
        kept_groups = _top(group_score, k)
        kept["heads"] = (kept_heads * kept_groups[..., None]).flatten(1)
        if "kv_groups" in scores:
            kept["kv_groups"] = kept_groups
    elif "kv_groups" in scores:
        kept["kv_groups"] = _top(scores["kv_groups"], k)
    return kept


def _group_view(spec: ArchSpec, kept: Mapping[str, Tensor]) -> Tensor:
    """[L, K, G] bool: the kept query heads by group."""
    gates = _as_gates(kept).full(spec)
    return gates.head_gate(spec).unflatten(1, (spec.kv_heads, spec.group_size)) != 0


def _top(scores: Tensor, count: int) -> Tensor:
    """Ones at the `count` highest scores along the last dimension, zeros elsewhere."""
    kept = torch.zeros_like(scores, dtype=torch.float64)
    return kept.scatter_(-1, scores.topk(count, dim=-1).indices, 1.0)


def _round(count: int, multiple: int, most: int, rounded: int | None = None) -> int:
    """`count` to the nearest multiple, at least one of it and at most `most` (which always is allowed)."""
    rounded = round(count / multiple) * multiple if rounded is None else rounded
    return min(max(rounded, min(multiple, most)), most)


def _sparsity(spec: ArchSpec, kept: Mapping[str, Tensor]) -> float:
    open_ = _as_gates(kept, torch.float64).full(spec).as_dict()
    return 1.0 - float(kept_parameters(spec, open_)) / spec.prunable


def _as_gates(kept: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Gates:
    return Gates(**{k: v.to(dtype) for k, v in kept.items()})
