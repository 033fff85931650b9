"""What goes wrong: in a rank at a counted moment, from outside at any time, or in the files between two starts.

A `Disturbance` travels into a rank (it is pickled) and acts there at its n-th moment: a file operation below the run
directory, which Python's audit events tell of, or a call of a collective. Nothing of the program is replaced.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FILE_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.truncate")
COLLECTIVES = ("all_reduce", "all_gather_object", "broadcast_object_list")
MOMENTS = ("file", "save", "collective")
DAY = 86400.0


@dataclass(frozen=True)
class Disturbance:
    """What one rank does to itself.

    Attributes:
        act: `kill`, `term`, `usr1`, `stop`, `clock` (jumps back a day) or `freeze` (the directory
            becomes read-only).
        at: number of the moment, from 1.
        rank: the rank.
        where: `file` (any file operation below `root`), `save` (those of directories that are being written), or
            `collective`.
        root: directory that is watched.
        marker: file that is written when it acts, outside of `root`.
    """

    act: str
    at: int
    rank: int
    where: str
    root: str
    marker: str

    def __call__(self, rank: int) -> None:
        """Take up watch in a rank that is about to start."""
        if rank != self.rank:
            return
        left = self.at

        def moment(where: str) -> None:
            nonlocal left
            left -= where == self.where
            if left == 0:
                left = -1
                self._act()

        watch(self.root, moment)

    def _act(self) -> None:
        Path(self.marker).touch()
        signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "stop": signal.SIGSTOP}
        if self.act in signals:
            os.kill(os.getpid(), signals[self.act])
        elif self.act == "clock":
            now = time.time
            time.time = lambda: now() - DAY
        elif self.act == "freeze":
            mount("--bind", self.root, self.root)
            mount("-o", "remount,bind,ro", self.root)


@dataclass(frozen=True)
class Tally:
    """Counts the moments of rank 0 in the lengths of the files `path`-file, `path`-save and `path`-collective."""

    root: str
    path: str

    def __call__(self, rank: int) -> None:
        """Take up watch in a rank that is about to start."""
        if rank == 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            tallies = {where: os.open(f"{self.path}-{where}", flags) for where in MOMENTS}
            watch(self.root, lambda where: os.write(tallies[where], b"."))


def watch(root: str, moment: Callable[[str], object]) -> None:
    """Call `moment` with its kind at each file operation below `root` and in each collective of this process."""
    import torch.distributed as dist

    def audit(event: str, args: tuple) -> None:
        if event in FILE_EVENTS and isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).startswith(root):
            moment("file")
            if ".tmp-" in os.fspath(args[0]):
                moment("save")

    def watched(call):
        def collective(*args, **kwargs):
            if call.__name__ == "all_reduce" and not kwargs.get("async_op"):
                work = call(*args, **kwargs, async_op=True)  # the others are in it by now, or will be
                moment("collective")
                return work.wait()
            moment("collective")
            return call(*args, **kwargs)

        return collective

    sys.addaudithook(audit)
    for name in COLLECTIVES:
        setattr(dist, name, watched(getattr(dist, name)))


def mount(*arguments: str) -> None:
    """mount(8), in the campaign's own mount namespace."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def unmount(path: Path) -> None:
    """umount(8); nothing where nothing is mounted."""
    subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


def damage(kind: str, file: Path, files: list[Path], live: Path, others: Path, rng: random.Random) -> str:
    """Truncate, alter, swap or remove a file; returns what was done.

    Args:
        kind: `truncated`, `altered`, `swapped` or `missing`.
        file: the file, not empty.
        files: others that it may change places with.
        live, others: directories of this run and of another, laid out alike: what is swapped comes from there, a
            checkpoint as a whole too, where it has the like.
        rng: chooses.
    """
    name, data = str(file.relative_to(live)), bytearray(file.read_bytes())
    if kind == "truncated":
        cut = rng.randrange(len(data))
        file.write_bytes(data[:cut])
        return f"{name} cut to {cut} of {len(data)} bytes"
    if kind == "altered":
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        data[place] ^= 1 << bit
        file.write_bytes(data)
        return f"{name}: bit {bit} of byte {place} turned"
    if kind == "missing":
        file.unlink()
        return f"{name} removed"
    whole = next((parent for parent in file.parents if parent.name.startswith("step-")), None)
    if whole is not None and rng.random() < 0.5 and (others / whole.relative_to(live)).is_dir():
        shutil.rmtree(whole)
        shutil.copytree(others / whole.relative_to(live), whole)
        return f"{whole.name} replaced by another run's"
    if (others / name).is_file() and rng.random() < 0.7:
        shutil.copyfile(others / name, file)
        return f"{name} replaced by another run's"
    second = rng.choice([f for f in files if f != file])
    file.write_bytes(second.read_bytes())
    second.write_bytes(data)
    return f"{name} and {second.relative_to(live)} changed places"
