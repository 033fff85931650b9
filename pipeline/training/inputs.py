"""What ranks read before the first step: the model of the hub once a node, the text once a run."""

from __future__ import annotations

import platform

import torch

from nuteprune.data.batches import check_split
from nuteprune.data.prepared import TrainingText
from nuteprune.errors import UserError
from nuteprune.model.hub import fetch
from nuteprune.parallel.distributed import World


def fetch_once(path: str, world: World) -> None:
    """Download a model of the hub, by the first rank of each node while the others wait; collective.

    Otherwise rank 0 would download it where the others wait in a collective, longer than `train.rank_timeout`.
    """
    nodes = world.gather(platform.node())  # local_rank is 0 on all ranks of a node that see a card of their own alone
    first = nodes.index(nodes[world.rank])
    world.unhurried(lambda: fetch(path) if world.rank == first else None)


def shared_blocks(text: TrainingText, world: World, batch_size: int) -> torch.LongTensor:
    """The training text as blocks [N, T], read and packed once for all ranks; collective. Raises as `packed_blocks`.

    Of several ranks rank 0 packs it into the run directory, where `prepare` would have put it.
    """
    if world.size == 1:
        return text.blocks()
    with world.together():
        check_split(batch_size, world.size)  # before anything is written

    def pack() -> None:
        if world.is_main and text.load() is None:
            text.save(text.pack())

    world.unhurried(pack)
    with world.together():
        blocks = text.load()
        if blocks is None:
            raise UserError(f"{text.directory} is not seen here: run_dir must be in a file system that all ranks share")
    return blocks
