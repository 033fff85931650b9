"""Directories that are complete or absent: sha256 manifests, atomic renames, and the newest one that is whole."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nuteprune.errors import MachineError

MANIFEST = "manifest.json"
Facts = Mapping[str, dict[str, Any]]
"""Of files by name: `bytes` and `sha256`."""
JSON_LIMIT = 1 << 26
"""Bytes of a JSON file that is read: an export of 70B lists up to 80 x 28,672 kept FFN units, about 16 MB."""


def seconds_between(saving: float) -> float:
    """Seconds from one checkpoint to the next where one takes `saving` seconds: at most 5% of the time is for them."""
    return max(300.0, 19 * saving)


class CheckpointError(Exception):
    """A directory that is incomplete, truncated or altered; the message says which file and how it differs."""


@contextmanager
def atomic_directory(target: Path, lender: Path | None = None, read: Facts | None = None) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success write its manifest, flush it to disk and rename it to `target`.

    An existing `target` is replaced only after the new one is complete; on an error nothing is left behind. What a
    killed process moved aside is put back first. Of two at once the one that ends last wins.

    Args:
        lender: a directory with a manifest, of which files may be hard links: those are not read again.
        read: what the manifest is to say of files that were read elsewhere, by name.

    Raises:
        MachineError: the disk is full or the place cannot be written to.
    """
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        name = glob.escape(target.name)
        for kind in ("tmp", "old"):  # left by a process that was killed here
            for left in target.parent.glob(f".{name}.{kind}-*"):
                if kind == "old" and not target.exists():  # killed between the two renames
                    left.rename(target)
                else:
                    with suppress(OSError), _held(left):
                        shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        with _held(temporary):
            yield temporary
            write_manifest(temporary, lender=lender, read=read)
            for path in [*temporary.rglob("*"), temporary]:
                _fsync(path)
            if target.exists():
                target.rename(old)
            temporary.rename(target)
        _fsync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise MachineError(
            f"cannot write {target}: {reason}; free space or choose another directory (what was saved before is intact)"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """A block in which no other process deletes a half-written directory; `BlockingIOError` where another is in it.

    Where the file system cannot lock a directory, as an NFS, nothing is held.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def _is_of_the_disk(error: Exception) -> bool:
    """Whether writing failed; tokenizers, written in Rust as safetensors is, says so in a bare `Exception`."""
    return isinstance(error, (OSError, SafetensorError)) or "(os error " in str(error)


def write_manifest(
    directory: Path, names: Iterable[str] | None = None, lender: Path | None = None, read: Facts | None = None
) -> None:
    """Write manifest.json: size and sha256 of the named files, or of every file below the directory.

    Of a hard link to a file of the same name in `lender` they are what that one's manifest says, of a file in `read`
    what that says.
    """
    paths = sorted(p for p in directory.rglob("*") if p.is_file()) if names is None else [directory / n for n in names]
    known, files = {} if lender is None else recorded(lender), {}
    read = read or {}
    for path in paths:
        name = str(path.relative_to(directory))
        if lender is not None and name in known and path.samefile(lender / name):
            files[name] = known[name]
        elif name in read:
            files[name] = read[name]
        elif path.name != MANIFEST:
            files[name] = facts(path)
    write_atomic(directory / MANIFEST, (json.dumps({"files": files}, indent=1) + "\n").encode())


def update_manifest(directory: Path, name: str) -> None:
    """Record anew the size and sha256 of one file that was replaced; the other files are not read."""
    files = recorded(directory)
    files[name] = facts(directory / name)
    write_atomic(directory / MANIFEST, (json.dumps({"files": files}, indent=1) + "\n").encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    A symbolic link in its place is replaced, never written through: in someone else's directory it may lead anywhere.

    Raises:
        OSError: names the file.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def verify(directory: Path) -> None:
    """Raise `CheckpointError` unless every file of the manifest is there with its size and sha256.

    Files are read beside each other: a sharded checkpoint of 35B parameters has 420 GB of them.
    """
    files = recorded(directory)
    with ThreadPoolExecutor() as pool:  # sha256 lets other threads work
        for _ in pool.map(partial(_verify_file, directory), files, files.values()):
            pass


def _verify_file(directory: Path, name: str, expected: Mapping[str, Any]) -> None:
    path = inside(directory, name)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
    if sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{path} does not match its sha256")


def recorded(directory: Path) -> dict[str, dict[str, Any]]:
    """The files of a manifest by name, each with `bytes` and `sha256`; raises `CheckpointError` where there is none."""
    try:
        files = read_json(directory / MANIFEST)["files"]
        if all({"bytes", "sha256"} <= known.keys() for known in files.values()):
            return files
    except (CheckpointError, LookupError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"{directory} has no readable {MANIFEST}")


def inside(directory: Path, name: str) -> Path:
    """The file of that name in a directory; raises `CheckpointError` where it leaves the directory, by a link too."""
    path = directory / name
    if "\0" in name or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise CheckpointError(f"{directory} names a file outside of it: {name!r}")
    return path


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises `CheckpointError` where it is not readable, or larger than `JSON_LIMIT`."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path} has more than {JSON_LIMIT} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} is not readable: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON") from None


def facts(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """The checkpoints of one run: `step-N` directories, the newest ones kept.

    Args:
        directory: where they live.
        keep: how many stay after a save.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory, self.keep = directory, keep

    def path(self, step: int) -> Path:
        """Directory of the checkpoint taken after `step` steps."""
        return self.directory / f"step-{step:08d}"

    def newest_first(self) -> list[Path]:
        """All complete-looking checkpoints (their rename happened), newest first."""
        return sorted(self.directory.glob("step-*"), reverse=True)

    def newest(self) -> Path | None:
        """The newest checkpoint, if there is one."""
        return next(iter(self.newest_first()), None)

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies, and for each newer one why it was skipped."""
        skipped = []
        for path in self.newest_first():
            try:
                verify(path)
            except CheckpointError as error:
                skipped.append(str(error))
                continue
            return path, skipped
        return None, skipped

    def drop_newer_than(self, path: Path | None) -> None:
        """Delete the checkpoints that were skipped for `path`: they must not count as kept, nor lend their files."""
        for other in self.newest_first():
            if path is None or other.name > path.name:
                try:
                    shutil.rmtree(other)
                except OSError as error:
                    raise MachineError(f"{other} is damaged and cannot be deleted: {error.strerror}") from None

    def prune(self) -> None:
        """Delete all but the newest `keep` checkpoints, and what killed saves left behind."""
        for path in [*self.newest_first()[self.keep :], *self.directory.glob(".step-*")]:
            shutil.rmtree(path, ignore_errors=True)
