"""What a run measures before its first step, on disk until it ends: a restart reads it and measures nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from nuteprune.errors import MachineError
from nuteprune.runs.checkpoint import sha256, write_atomic


class Preparation:
    """Tensors by name, each file with its own hash and that of what it was measured on.

    Args:
        directory: where they live.
        inputs: fingerprints of the model and the text.
    """

    def __init__(self, directory: Path, inputs: Mapping[str, str | None]):
        self.directory = directory
        self.key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors in host memory; raises `MachineError` where that fails."""
        data = save(tensors)
        path = self.directory / f"{name}.{self.key}.{hashlib.sha256(data).hexdigest()}.safetensors"
        try:
            self.directory.mkdir(exist_ok=True)
            write_atomic(path, data)
        except OSError as error:
            raise MachineError(
                f"cannot write {path}: {error.strerror}; free space or choose another directory"
            ) from None

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What was written under a name; None where it is missing or damaged."""
        for path in self.directory.glob(f"{name}.{self.key}.*.safetensors"):
            if sha256(path) == path.name.split(".")[-2]:
                return load_file(path)
        return None
