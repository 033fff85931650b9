"""Who and where this process is: rank, world size and device."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""


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
    _keep_freed_memory()
    return World()


def _keep_freed_memory() -> None:
    """Ask glibc not to hand activation-sized buffers back to the system after each use.

    Fetching them again costs a page fault every 4 KB, a fifth of a step's time on a CPU.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(parameter, 1 << 30)
