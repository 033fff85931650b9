"""One recorded teacher: what a snapshot of the student is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

from nuteprune.masks import Gates

Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """One recorded teacher.

    Attributes:
        step: optimizer step after which it was taken.
        sparsity: expected sparsity at that moment.
        gates: deterministic gates, float32.
        scores: log-alpha by kind, float32: the order in which units leave, for export.
        lora: LoRA pairs in bfloat16.
        frozen: those of `lora.refit`, in bfloat16, without the last ranks where those are zero; snapshots between which
            they did not change have the same ones.
        fitted: step of which those are, None where there are none.
        teaches: whether it can be a teacher. One that cannot is a rung: it has no LoRA, and while the run trains no
            tensors at all, which lie on the disk.
    """

    step: int
    sparsity: float
    gates: Gates
    scores: dict[str, Tensor]
    lora: Pairs
    frozen: Pairs = field(default_factory=dict)
    fitted: int | None = None
    teaches: bool = True

    @property
    def nbytes(self) -> int:
        """Host memory of the snapshot in bytes, without `frozen`."""
        pairs = (t for pair in self.lora.values() for t in pair)
        return sum(t.nbytes for t in (*self.gates.as_dict().values(), *self.scores.values(), *pairs))

    def map(self, function: Callable[[Tensor], Tensor]) -> Snapshot:
        """The same snapshot with a function applied to every tensor."""
        return replace(
            self,
            gates=Gates(**{k: function(z) for k, z in self.gates.as_dict().items()}),
            scores={k: function(s) for k, s in self.scores.items()},
            lora=_map(self.lora, function),
            frozen=_map(self.frozen, function),
        )


def nbytes(snapshots: Iterable[Snapshot]) -> int:
    """Host memory of snapshots in bytes, in which what several share counts once."""
    snapshots = list(snapshots)
    shared = {id(t): t.nbytes for s in snapshots for pair in s.frozen.values() for t in pair}
    return sum(s.nbytes for s in snapshots) + sum(shared.values())


def _map(pairs: Pairs, function: Callable[[Tensor], Tensor]) -> Pairs:
    return {key: (function(a), function(b)) for key, (a, b) in pairs.items()}
