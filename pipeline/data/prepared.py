"""Training text that was tokenised and packed once, kept in the run directory for every later stage and rank."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nuteprune.config import DataConfig
from nuteprune.data.sequences import SequenceForm, sequence_form
from nuteprune.data.text import on_hub, packed_blocks, sources, text_files
from nuteprune.errors import UserError
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
        facts = self._settings | {"sequence": sequence_form(self.base.tokenizer).as_dict(), "vocabulary": self._tokens,
                                  "files": self._files}  # fmt: skip
        with atomic_directory(self.directory) as temporary:
            save_file({"blocks": blocks.to(torch.int32)}, temporary / "blocks.safetensors")
            (temporary / "prepared.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return self.directory

    def load(self) -> torch.LongTensor | None:
        """The blocks that were made with these settings and that are whole, or None.

        Raises:
            UserError: they were made with these settings, but without the tokenizer's own first token and separator,
                as earlier versions made them.
        """
        if not self.run_dir or not (self.directory / MANIFEST).is_file():
            return None
        try:
            verify(self.directory)
            facts = read_json(self.directory / "prepared.json")
            blocks = load_file(self.directory / "blocks.safetensors")["blocks"].long()
        except (CheckpointError, SafetensorError, OSError, LookupError) as error:
            log.warning("%s is damaged, so the text is packed again: %s", self.directory, error)
            return None
        eos = self.base.tokenizer.eos_token_id
        before = SequenceForm(end=() if eos is None else (eos,)).as_dict()
        packed, files = facts.pop("sequence", before), facts.pop("files", "")
        if facts.pop("vocabulary", self._tokens) != self._tokens or facts != self._settings:
            return None
        if packed != sequence_form(self.base.tokenizer).as_dict():
            raise UserError(
                f"{self.directory} was packed by another version, without the tokenizer's own first token and "
                "separator: remove it and run `nuteprune prepare` again with the same settings"
            )
        if files and self._files not in ("", files):
            log.warning(
                "%s was written to since it was packed, and what was packed is trained on: remove %s to pack it anew",
                self.data.source, self.directory,
            )  # fmt: skip
        return blocks

    @property
    def _files(self) -> str:
        """Of the sizes and times of the source's files, empty where there are none."""
        files: list[Path] = []
        with suppress(UserError):  # it holds no text any more
            for place, _ in sources(self.data.source):
                files += [] if on_hub(place) else text_files(place)
        found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return sha256(json.dumps(found).encode()).hexdigest() if found else ""

    @property
    def _tokens(self) -> str:
        """Of the tokenizer's tokens and their ids, which may have changed at the same path."""
        return sha256(json.dumps(sorted(self.base.tokenizer.get_vocab().items())).encode()).hexdigest()

    @property
    def _settings(self) -> dict:
        return {"model": self.base.path, "data": asdict(self.data)}
