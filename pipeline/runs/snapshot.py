"""One recorded teacher: what a snapshot of the student is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from nuteprune.masks import Gates


@dataclass(frozen=True)
class Snapshot:
    """One recorded teacher.

    Attributes:
        step: optimizer step after which it was taken.
        sparsity: expected sparsity at that moment.
        gates: deterministic gates, float32.
        scores: log-alpha by kind, float32: the order in which units leave, for export.
        lora: LoRA pairs in bfloat16.
    """

    step: int
    sparsity: float
    gates: Gates
    scores: dict[str, Tensor]
    lora: dict[str, tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        """Host memory of the snapshot in bytes."""
        pairs = (t for pair in self.lora.values() for t in pair)
        return sum(t.nbytes for t in (*self.gates.as_dict().values(), *self.scores.values(), *pairs))

    def map(self, function: Callable[[Tensor], Tensor]) -> Snapshot:
        """The same snapshot with a function applied to every tensor."""
        return replace(
            self,
            gates=Gates(**{k: function(z) for k, z in self.gates.as_dict().items()}),
            scores={k: function(s) for k, s in self.scores.items()},
            lora={k: (function(a), function(b)) for k, (a, b) in self.lora.items()},
        )
