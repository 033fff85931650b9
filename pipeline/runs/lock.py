"""A directory for one process at a time: the system holds the lock, so a killed process leaves none behind."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nuteprune.errors import UserError

TRIES = 10
"""Times that a lock is asked for again whose file another process has just removed."""


@contextmanager
def alone(directory: Path, stage: str) -> Iterator[None]:
    """A block that no second process enters for the same directory and stage.

    Where the file system has no locks, or nothing can be written, the block runs without one.

    Raises:
        UserError: another process is in the block.
    """
    path = directory / f".{stage}.lock"
    file = _lock(path, stage)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink()  # before it is let go: the next process makes a file of its own
            os.close(file)


def _lock(path: Path, stage: str) -> int | None:
    """A descriptor that holds the lock; None where there is none to have."""
    for _ in range(TRIES):
        try:
            # Never through a symbolic link: in someone else's directory it may lead anywhere.
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError:
            return None
        try:
            holder = os.pread(file, 100, 0).decode(errors="replace")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), path.stat()):
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return file
        except BlockingIOError:
            os.close(file)
            raise UserError(
                f"run_dir {path.parent}: another `nuteprune {stage}` is at work there ({holder}): wait until it has "
                f"ended, or choose another run_dir (where its machine is down for good, remove {path})"
            ) from None
        except FileNotFoundError:  # removed by its holder before it was locked here
            pass
        except OSError:
            os.close(file)
            return None
        os.close(file)
    return None
