"""The terms of the loss: each a file, and a line of `TERMS`.

The paired forward, what is logged, TensorBoard's charts and the planner go by `TERMS`; none of them names a term.
"""

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
