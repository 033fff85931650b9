"""Training text that was tokenised and packed once, kept in the run directory for every later stage and rank."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from nuteprune.config import Config
from nuteprune.data.text import packed_blocks
from nuteprune.runs.checkpoint import MANIFEST, CheckpointError, atomic_directory, read_json, verify

log = logging.getLogger(__name__)


def save_blocks(config: Config, blocks: torch.LongTensor) -> Path:
    """Write packed blocks [N, T] and the settings they were made with to `prepared` below the run directory."""
    directory = Path(config.run_dir) / "prepared"
    with atomic_directory(directory) as temporary:
        save_file({"blocks": blocks.to(torch.int32)}, temporary / "blocks.safetensors")
        (temporary / "prepared.json").write_text(json.dumps(_settings(config), indent=1) + "\n", encoding="utf-8")
    return directory


def load_blocks(config: Config) -> torch.LongTensor | None:
    """The blocks [N, T] that the prepare stage made with these settings and that are whole, or None."""
    directory = Path(config.run_dir) / "prepared"
    if not config.run_dir or not (directory / MANIFEST).is_file():
        return None
    try:
        verify(directory)
        if read_json(directory / "prepared.json") != _settings(config):
            return None
        return load_file(directory / "blocks.safetensors")["blocks"].long()
    except (CheckpointError, SafetensorError, OSError, LookupError) as error:
        log.warning("%s is damaged, so the text is packed again: %s", directory, error)
        return None


def training_blocks(config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.LongTensor:
    """The run's training text as blocks [N, T]: prepared, or read and packed now; raises as `packed_blocks`."""
    blocks = load_blocks(config)
    return packed_blocks(config.data, tokenizer, vocab_size) if blocks is None else blocks


def _settings(config: Config) -> dict:
    return {"model": config.model.path, "data": asdict(config.data)}
