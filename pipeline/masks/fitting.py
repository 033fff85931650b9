"""From a student's gates to those of a model in a shape and at a sparsity that are asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import Shape
from nuteprune.errors import UserError
from nuteprune.masks.counts import Rounding
from nuteprune.masks.gates import Gates, sparsity_of
from nuteprune.masks.kept import Kept
from nuteprune.masks.mask_set import POINT
from nuteprune.masks.selection import select_units

log = logging.getLogger(__name__)

SUBLAYERS = ("attn_sublayers", "ffn_sublayers")


def fit_shape(
    spec: ArchSpec, gates: Gates, scores: Mapping[str, Tensor], target: float, shape: Shape,
    rounding: Rounding, like: Gates | None = None,
) -> Gates:  # fmt: skip
    """Gates of the model to export: the run's own if they fit the shape and the target, else chosen by score.

    A unit that stays keeps its gate's value, or gets 1 where the run had removed it.

    Args:
        spec: the architecture.
        gates, scores: the run's gates and log-alpha.
        target: wanted sparsity.
        shape: "uniform", "per_layer_ffn" or "per_layer".
        rounding: to what counts are rounded.
        like: the run's final student, whose kind of structure is taken where one has to be chosen.

    Raises:
        UserError: whole sublayers are removed but the shape is uniform, or the target is missed.
    """
    if shape == "uniform" and any((gates.as_dict()[k] == 0).any() for k in SUBLAYERS if k in gates.as_dict()):
        raise UserError(
            "the run removed whole sublayers, which no stock model lacks: use export.shape=per_layer_ffn or per_layer"
        )
    before = sparsity_of(spec, gates)
    near = abs(before - target) <= POINT
    kept = Kept.of(spec, gates)
    if near and _fits(kept, shape, rounding):
        return gates
    if shape == "uniform":
        scores = {kind: s for kind, s in scores.items() if kind not in SUBLAYERS}
    chosen = select_units(spec, scores, target, shape, rounding, like).as_dict()
    values = {k: torch.where(z == 0, torch.ones_like(z), z) for k, z in gates.as_dict().items()}
    settled = Gates(**{k: v * chosen[k] if k in chosen else v for k, v in values.items()})
    reached = sparsity_of(spec, settled)
    log.log(logging.INFO if near else logging.WARNING,
            "%d units change to fit the %s shape at %.2f%% (%.2f%% before)",
            kept.changed(Kept.of(spec, settled)), shape, 100 * reached, 100 * before)  # fmt: skip
    if abs(reached - target) > POINT:
        other = "" if shape == "per_layer" else ", or export.shape=per_layer"
        raise UserError(
            f"the {shape} shape reaches sparsity {reached:.3f} instead of {target:g}: take another sparsity{other}"
        )
    return settled


def _fits(kept: Kept, shape: Shape, rounding: Rounding) -> bool:
    """Whether a shape can hold what is kept."""
    if shape == "per_layer" or not kept.experts_are_alike:
        return kept.experts_are_alike
    every_width = [width for layer in kept.ffn_widths for width in layer]
    counts = [len(units) for units in kept.kv_groups] + every_width
    if any(count % rounding.parallel for count in counts):
        return False
    if shape == "uniform":
        return kept.is_uniform
    widths = all(width % rounding.ffn == 0 or width == kept.spec.ffn for width in every_width)
    return kept.attention_is_alike and widths
