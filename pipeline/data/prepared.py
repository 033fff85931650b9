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
from nuteprune.data.sequences import SequenceForm, sequence_form
from nuteprune.data.text import packed_blocks
from nuteprune.errors import UserError
from nuteprune.runs.checkpoint import MANIFEST, CheckpointError, atomic_directory, read_json, verify

log = logging.getLogger(__name__)


def save_blocks(config: Config, blocks: torch.LongTensor, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write packed blocks [N, T] and what they were made with to `prepared` below the run directory."""
    directory = Path(config.run_dir) / "prepared"
    facts = _settings(config) | {"sequence": sequence_form(tokenizer).as_dict()}
    with atomic_directory(directory) as temporary:
        save_file({"blocks": blocks.to(torch.int32)}, temporary / "blocks.safetensors")
        (temporary / "prepared.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return directory


def load_blocks(config: Config, tokenizer: PreTrainedTokenizerBase) -> torch.LongTensor | None:
    """The blocks [N, T] that the prepare stage made with these settings and that are whole, or None.

    Raises:
        UserError: they were made with these settings, but without the tokenizer's own first token and separator, as
            earlier versions made them.
    """
    directory = Path(config.run_dir) / "prepared"
    if not config.run_dir or not (directory / MANIFEST).is_file():
        return None
    try:
        verify(directory)
        facts = read_json(directory / "prepared.json")
        blocks = load_file(directory / "blocks.safetensors")["blocks"].long()
    except (CheckpointError, SafetensorError, OSError, LookupError) as error:
        log.warning("%s is damaged, so the text is packed again: %s", directory, error)
        return None
    eos = tokenizer.eos_token_id
    before = SequenceForm(end=() if eos is None else (eos,)).as_dict()
    packed = facts.pop("sequence", before)
    if facts != _settings(config):
        return None
    if packed != sequence_form(tokenizer).as_dict():
        raise UserError(
            f"{directory} was packed by another version, without the tokenizer's own first token and separator: "
            "remove it and run `nuteprune prepare` again with the same settings"
        )
    return blocks


def training_blocks(config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.LongTensor:
    """The run's training text as blocks [N, T]: prepared, or read and packed now; raises as the two that do it."""
    blocks = load_blocks(config, tokenizer)
    return packed_blocks(config.data, tokenizer, vocab_size) if blocks is None else blocks


def _settings(config: Config) -> dict:
    return {"model": config.model.path, "data": asdict(config.data)}
