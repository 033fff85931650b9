"""Batches of packed text, in an order that is a function of the step.

Shape letters: N blocks, B sequences of the global batch, T tokens of a block.
"""

from __future__ import annotations

import numpy as np
import torch

from nuteprune.errors import UserError


def check_split(batch_size: int, world: int) -> None:
    """Raise `UserError` where so many processes cannot share a batch evenly."""
    if batch_size % world:
        raise UserError(
            f"train.batch_size {batch_size} cannot be split over {world} processes: make it a multiple of {world}"
        )


class BatchStream:
    """Batches as a pure function of the global step, the same global batch for any number of ranks.

    Step s takes the positions s·B … s·B+B-1 of the endless stream made of one permutation of all blocks after another;
    the permutation of epoch e is seeded by (seed, e). Going on in mid-epoch is asking for a later step.

    Args:
        blocks: token ids `[N, T]`.
        batch_size: B, over all ranks.
        seed: seed of the order.
        rank: this process; it takes the rank-th contiguous slice of the global batch.
        world: number of processes.
        read: steps that were read before; step 0 is the one behind them.

    Raises:
        UserError: `world` does not divide `batch_size`.
    """

    def __init__(
        self, blocks: torch.LongTensor, batch_size: int, seed: int, rank: int = 0, world: int = 1, read: int = 0
    ) -> None:
        check_split(batch_size, world)
        assert 0 <= rank < world
        self.blocks = blocks
        self.batch_size = batch_size
        self.seed, self.read = seed, read
        self.local_size = batch_size // world
        self.offset = rank * self.local_size
        self._epoch = -1
        self._order: np.ndarray = np.empty(0, dtype=np.int64)

    @property
    def steps_per_epoch(self) -> float:
        """Steps that show every block once."""
        return len(self.blocks) / self.batch_size

    def batch(self, step: int) -> torch.LongTensor:
        """This rank's sequences `[B // world, T]` of the global batch of a step, counted from 0."""
        start = (self.read + step) * self.batch_size + self.offset
        rows = [self._block_at(position) for position in range(start, start + self.local_size)]
        return self.blocks[torch.tensor(rows)].long()

    def _block_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.blocks))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.blocks))
            self._epoch = epoch
        return int(self._order[index])
