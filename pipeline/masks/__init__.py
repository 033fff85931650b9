"""Learned gates: their distribution, sets of them, what they keep, sparsity counts, schedules, and the choice of units.

Pure arithmetic on tensors and an `ArchSpec`: no model, no files. Everything above may call it.
"""

from nuteprune.masks.counts import Rounding, mean_counts
from nuteprune.masks.fitting import fit_shape
from nuteprune.masks.gates import KINDS, Gates, kept_parameters, sparsity_of, unit_shape
from nuteprune.masks.kept import Kept
from nuteprune.masks.mask_set import POINT, MaskSet, check_target, gated_kinds
from nuteprune.masks.selection import select_units
