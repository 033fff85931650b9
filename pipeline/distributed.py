"""Who and where this process is: rank, world size and device."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0


def discover() -> World:
    """The world of a single process: the first accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return World(device=torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    return World()
