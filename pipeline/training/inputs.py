"""What ranks read before the first step: the model of the hub once a node, the text once a run."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from nuteprune.config import Config, ConfigError
from nuteprune.data.prepared import load_blocks, save_blocks, training_blocks
from nuteprune.data.text import check_split, packed_blocks
from nuteprune.model.hub import fetch
from nuteprune.parallel.distributed import World


def fetch_once(config: Config, world: World) -> None:
    """Download a model of the hub, by the first rank of each node while the others wait; collective.

    Otherwise rank 0 would download it where the others wait in a collective, longer than `train.rank_timeout`.
    """
    world.unhurried(lambda: fetch(config.model.path) if world.local_rank == 0 else None)


def shared_blocks(config: Config, world: World, tokenizer: PreTrainedTokenizerBase, vocab: int) -> torch.LongTensor:
    """The training text as blocks [N, T], read and packed once for all ranks; collective. Raises as `packed_blocks`.

    Of several ranks rank 0 packs it into the run directory, where `prepare` would have put it.
    """
    if world.size == 1:
        return training_blocks(config, tokenizer, vocab)
    with world.together():
        check_split(config.train.batch_size, world.size)  # before anything is written

    def pack() -> None:
        if world.is_main and load_blocks(config, tokenizer) is None:
            save_blocks(config, packed_blocks(config.data, tokenizer, vocab), tokenizer)

    world.unhurried(pack)
    with world.together():
        blocks = load_blocks(config, tokenizer)
        if blocks is None:
            raise ConfigError(f"{config.run_dir}/prepared is not seen here: run_dir must be in a file system that all "
                              "ranks share")  # fmt: skip
    return blocks
