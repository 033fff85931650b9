"""A directory for one process at a time: the system holds the lock, so a killed process leaves none behind.

The file of the lock says who has it. It stays where its holder was killed, and where it failed, with what it failed of.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nuteprune.errors import UserError, first_line

FAILED = "failed: "
TRIES = 10
"""Times that a lock is asked for again whose file another process has just removed."""


@contextmanager
def alone(directory: Path, stage: str) -> Iterator[None]:
    """A block that no second process enters for the same directory and stage.

    Where the file system has no locks, or nothing can be written, the block runs without one; and so does a SLURM job
    that was requeued, beside what its own start before it has left (the server of an NFS keeps the lock of a node that
    is down).

    Raises:
        UserError: another process is in the block.
    """
    path = _path(directory, stage)
    file, fault = _lock(path, stage), ""
    try:
        yield
    except Exception as error:
        fault = FAILED + first_line(error, 400)
        raise
    finally:
        if file is not None:
            with suppress(OSError):
                if fault:
                    _write(file, fault)
                else:
                    path.unlink()  # before it is let go: the next process makes a file of its own
            os.close(file)


def found(directory: Path, stage: str) -> tuple[str, bool]:
    """What the file of a lock says, empty where there is none, and whether a process has it now."""
    try:
        file = os.open(_path(directory, stage), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return "", False
    try:
        said, held = os.pread(file, 1000, 0).decode(errors="replace"), False
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        held = isinstance(error, BlockingIOError)
    finally:
        os.close(file)
    return said, held


def check_free(directory: Path, stage: str) -> None:
    """Raise `UserError`, as `alone` does, where another process is in its block now."""
    holder, held = found(directory, stage)
    if held:
        _refuse(_path(directory, stage), stage, holder)


def _refuse(path: Path, stage: str, holder: str) -> None:
    job = _job()
    if not (job and holder.endswith(job) and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"):
        raise UserError(
            f"run_dir {path.parent}: another `nuteprune {stage}` is at work there ({holder}): wait until it has "
            f"ended, or choose another run_dir (where its machine is down for good, remove {path})"
        ) from None


def _path(directory: Path, stage: str) -> Path:
    return directory / f".{stage}.lock"


def _write(file: int, text: str) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, text.encode(), 0)
    os.fsync(file)  # an NFS would keep it here until the file is closed


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
                _write(file, _who())
                return file
        except BlockingIOError:
            os.close(file)
            _refuse(path, stage, holder)
            return None
        except FileNotFoundError:  # removed by its holder before it was locked here
            pass
        except OSError:
            os.close(file)
            return None
        os.close(file)
    return None


def _who() -> str:
    """This process, as a refused one is told of it."""
    return f"process {os.getpid()} on {socket.gethostname()}{_job()}"


def _job() -> str:
    """The SLURM job of this process, if it has one."""
    job = os.environ.get("SLURM_JOB_ID")
    return f", SLURM job {job}" if job else ""
