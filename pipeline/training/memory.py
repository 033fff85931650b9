"""What a failed allocation looks like, and what a run learns from it. Imports no torch: the command line asks too."""

from __future__ import annotations

import re
from pathlib import Path

LIMIT = "micro-batch-"
"""Empty files of such names beside a run's checkpoints: sequences at a time that a start may take at most."""
_REFUSED = re.compile(r"can't allocate memory|[Ee]rror( \[\w+\])?: out of memory|STATUS_ALLOC_FAILED")
"""Of torch's allocator for the host; of the driver, as torch and triton tell it where code is loaded or memory pinned
beside what torch has taken; of cuBLAS and cuSOLVER."""


class TooLarge(RuntimeError):
    """A rank ran out of memory while the others wait for it in a gather; the next start takes fewer sequences."""

    exit_code = 75
    """As of `signals.Preempted`: the same command goes on from the newest checkpoint."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: by its type, or by its message where it has none of its own."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or _REFUSED.search(str(error)) is not None


def remember(directory: Path, size: int) -> None:
    """Let later starts take at most `size` sequences at a time. Any rank may say so, several at once too."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{LIMIT}{size}").touch()


def remembered(directory: Path, size: int) -> int:
    """`size`, or the least that was remembered there."""
    return min([size, *(int(path.name.removeprefix(LIMIT)) for path in directory.glob(f"{LIMIT}*"))])
