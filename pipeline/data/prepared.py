"""Training text that was tokenised and packed once, kept in the run directory for every later stage and rank."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nuteprune.config import DataConfig
from nuteprune.data.sequences import sequence_form
from nuteprune.data.text import packed_blocks
from nuteprune.model.loading import Base
from nuteprune.runs.checkpoint import MANIFEST, CheckpointError, atomic_directory, read_json, verify

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingText:
    """What a run is trained on, as blocks [N, T] of its base model's tokens.

    Attributes:
        run_dir: the directory of the run, below which `prepared` holds them; empty: none.
        data: what is read.
        base: the model.
    """

    run_dir: str
    data: DataConfig
    base: Base

    @property
    def directory(self) -> Path:
        """Where the blocks are kept."""
        return Path(self.run_dir) / "prepared"

    def blocks(self) -> torch.LongTensor:
        """Those that are kept, or else read and packed now; raises as the two that do it."""
        kept = self.load()
        return self.pack() if kept is None else kept

    def pack(self) -> torch.LongTensor:
        """Read and pack the text; raises as `packed_blocks`."""
        return packed_blocks(self.data, self.base.tokenizer, self.base.spec.vocab)

    def save(self, blocks: torch.LongTensor) -> Path:
        """Write blocks and what they were made with; returns the directory."""
        with atomic_directory(self.directory) as temporary:
            save_file({"blocks": blocks.to(torch.int32)}, temporary / "blocks.safetensors")
            (temporary / "prepared.json").write_text(json.dumps(self._settings, indent=1) + "\n", encoding="utf-8")
        return self.directory

    def load(self) -> torch.LongTensor | None:
        """The blocks that were made with these settings and that are whole, or None."""
        if not self.run_dir or not (self.directory / MANIFEST).is_file():
            return None
        try:
            verify(self.directory)
            facts = read_json(self.directory / "prepared.json")
            blocks = load_file(self.directory / "blocks.safetensors")["blocks"].long()
        except (CheckpointError, SafetensorError, OSError, LookupError) as error:
            log.warning("%s is damaged, so the text is packed again: %s", self.directory, error)
            return None
        return blocks if facts == self._settings else None

    @property
    def _settings(self) -> dict:
        data, sequence = asdict(self.data), sequence_form(self.base.tokenizer)
        return {"model": self.base.path, "data": data, "sequence": sequence}
