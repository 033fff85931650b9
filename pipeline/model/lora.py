"""The student's update of the frozen weights: LoRA in training, and on down_proj a pair beside it that is not trained.

That pair is `lora.refit`'s (training/refit.py). A projection that has both computes with one pair of all their ranks,
in the model's type: the frozen ranks live there, and those in training are copied in behind them after each step.

Shape letters: K inputs, N outputs, Q frozen ranks, R ranks in training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nuteprune.model.layers import LoraParameters, LoraWeights


class Update:
    """LoRA of a model and its frozen ranks.

    Args:
        lora: the pairs in training.
        frozen: Q, by "layer.projection".
        dtype: the model's type.

    Attributes:
        whole: pairs (A [Q + R, K], B [N, Q + R]) of the projections that have frozen ranks.
        frozen: the first Q ranks of those, in the same memory.
    """

    def __init__(self, lora: LoraParameters, frozen: Mapping[str, int], dtype: torch.dtype):
        self.lora = lora
        self.whole = {key: self._room(lora[key], ranks, dtype) for key, ranks in frozen.items()}
        self.frozen = {key: (a[: frozen[key]], b[:, : frozen[key]]) for key, (a, b) in self.whole.items()}
        learned = [(a[frozen[key] :], b[:, frozen[key] :]) for key, (a, b) in self.whole.items()]
        self._copies = [t for pair in learned for t in pair]
        self.refresh()

    @staticmethod
    def _room(pair: tuple[Tensor, Tensor], ranks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, b = (t.detach() for t in pair)
        return a.new_zeros(len(a) + ranks, a.shape[1], dtype=dtype), b.new_zeros(len(b), len(a) + ranks, dtype=dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the ranks in training, after they have changed."""
        if self._copies:
            # Looked up each time: a sharded optimizer moves parameters into buckets of its own.
            torch._foreach_copy_(self._copies, [t for key in self.whole for t in self.lora[key]])

    @torch.no_grad()
    def load(self, pairs: LoraWeights) -> None:
        """Take over pairs of all ranks, frozen ones first; ranks and projections that they lack stay as they are."""
        for key, (a, b) in pairs.items():
            ranks = len(self.frozen[key][0]) if key in self.frozen else 0
            for own, value in zip(self.frozen.get(key, ()), (a[:ranks], b[:, :ranks]), strict=False):
                own.copy_(value)
            own_a, own_b = self.lora[key]
            own_a[: len(a) - ranks] = a[ranks:]
            own_b[:, : len(a) - ranks] = b[:, ranks:]
        self.refresh()

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Pairs of all ranks, frozen ones first, in the type of those in training: what `load` takes."""
        return joined({key: tuple(t.detach() for t in pair) for key, pair in self.lora.items()}, self.frozen)


def joined(lora: LoraWeights, frozen: LoraWeights) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA with frozen ranks before its own, in its type."""
    whole = dict(lora)
    for key, (a_QK, b_NQ) in frozen.items():
        a, b = lora.get(key, (a_QK[:0], b_NQ[:, :0]))
        whole[key] = torch.cat([a_QK.to(a.dtype), a]), torch.cat([b_NQ.to(b.dtype), b], 1)
    return whole


def trimmed(pairs: LoraWeights) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs without the last ranks whose row of A is zero, in memory of their own."""
    used = {key: max(a.any(1).nonzero().flatten().tolist(), default=-1) + 1 for key, (a, _) in pairs.items()}
    return {key: (a[: used[key]].clone(), b[:, : used[key]].clone()) for key, (a, b) in pairs.items()}


def padded(pairs: LoraWeights, ranks: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of so many ranks, the last of them zero: the inverse of `trimmed`."""
    return {key: (F.pad(a, (0, 0, 0, ranks - len(a))), F.pad(b, (0, ranks - len(a)))) for key, (a, b) in pairs.items()}
