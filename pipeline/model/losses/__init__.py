"""The terms of the loss: each a file, and a line of `TERMS`.

The paired forward, what is logged, TensorBoard's charts and the planner go by `TERMS`; none of them names a term.
"""

from dataclasses import replace
from typing import Any

from nuteprune.config import LossConfig
from nuteprune.model.losses.base import IGNORE, LayerTerm, OutputTerm, Term
from nuteprune.model.losses.kl import Kl
from nuteprune.model.losses.label import Label
from nuteprune.model.losses.layer import Layer

TERMS: dict[str, Term] = {term.name: term for term in (Layer(), Kl(), Label())}


def weights(config: LossConfig, taught: bool, answers: bool = False) -> dict[Term, float]:
    """The terms of a step with their weights; arguments as of `Term.weight`."""
    found = {term: term.weight(config, taught, answers) for term in TERMS.values()}
    return {term: weight for term, weight in found.items() if weight}


def without_layers(config: LossConfig) -> LossConfig:
    """The same without layer terms."""
    off: dict[str, Any] = {f"{name}_weight": 0.0 for name, term in TERMS.items() if isinstance(term, LayerTerm)}
    return replace(config, **off)


def output_weights(config: LossConfig, answers: bool = False) -> dict[OutputTerm, float]:
    """The output terms beside a teacher with their weights: what distillation learns by; `answers`: of records."""
    found = weights(config, taught=True, answers=answers)
    return {term: weight for term, weight in found.items() if isinstance(term, OutputTerm)}


def learns_of_outputs(config: LossConfig) -> bool:
    """Whether one of those learns of the teacher's predictions."""
    return any(term.needs_teacher for term in output_weights(config))
