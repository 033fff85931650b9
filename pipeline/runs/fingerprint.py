"""A cheap fingerprint of a base model's weights: gates and LoRA are worth nothing on another model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from nuteprune.errors import MachineError, UserError
from nuteprune.runs.checkpoint import sha256

SAMPLE = 1024
"""Bytes read at the start, the middle and the end of each tensor: any training changes all of them, and 70B parameters
cost 2 MB of reading instead of 140 GB."""


def fingerprint(path: str) -> str | None:
    """Hex sha256 over name, type, shape and samples of every tensor, whatever files they are spread over.

    Models without safetensors are hashed in full.

    Args:
        path: directory or hub id of a model that was loaded before.

    Returns:
        None where there are no weights to read.

    Raises:
        MachineError: a weight file that is damaged.
    """
    try:
        folder = Path(cached_file(path, "config.json")).parent
    except OSError:  # whoever loads the model says what is wrong with it
        return None
    entries = sorted(entry for file in folder.glob("model*.safetensors") for entry in _tensors(file))
    entries = entries or sorted(sha256(file).encode() for file in folder.glob("*.bin"))
    return hashlib.sha256(b"".join(entries)).hexdigest() if entries else None


def check_base(path: str, expected: str | None) -> None:
    """Raise `UserError` unless the weights at `path` have the fingerprint that a run recorded (None: none)."""
    if expected and (found := fingerprint(path)) and found != expected:
        raise UserError(
            f"model.path {path} is not the base model that was pruned (weights {found[:12]}, not {expected[:12]}): "
            "set model.path to that one"
        )


def _tensors(file: Path) -> Iterator[bytes]:
    """Name, type, shape and hashed samples of each tensor of a safetensors file."""
    try:
        with safe_open(file, framework="pt"):  # checks that the header's sizes and places are true
            pass
    except (SafetensorError, OSError) as error:
        raise MachineError(f"{file} is damaged ({error}): fetch it again") from None
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        for name, facts in header.items():
            if name == "__metadata__":
                continue
            begin, end = facts["data_offsets"]
            digest = hashlib.sha256()
            for offset in (begin, (begin + end) // 2, max(begin, end - SAMPLE)):
                f.seek(8 + length + offset)
                digest.update(f.read(min(SAMPLE, end - offset)))
            yield f"{name} {facts['dtype']} {facts['shape']} {digest.hexdigest()}\n".encode()
