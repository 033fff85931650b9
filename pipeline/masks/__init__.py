"""Learned gates: distribution, sets of gates, sparsity counts, schedules."""

from pipeline.masks.gates import KINDS, Gates, kept_parameters, sparsity_of, unit_shape
from pipeline.masks.mask_set import POINT, MaskSet, check_target, gated_kinds, multiples
from pipeline.masks.selection import select_units

__all__ = [
    "KINDS",
    "POINT",
    "Gates",
    "MaskSet",
    "check_target",
    "gated_kinds",
    "kept_parameters",
    "multiples",
    "select_units",
    "sparsity_of",
    "unit_shape",
]
