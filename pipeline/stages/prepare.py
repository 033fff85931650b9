"""The prepare stage: fetch the model and check its files, tokenise and pack the text, once and without a GPU."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nuteprune.config import Config
from nuteprune.data.instructions import packed_windows
from nuteprune.data.prepared import TrainingText
from nuteprune.errors import MachineError, UserError
from nuteprune.model.hub import fetch, weight_files
from nuteprune.model.loading import read_base
from nuteprune.runs.checkpoint import CheckpointError, read_json

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"


def run(config: Config) -> Path:
    """Make ready what the other stages read; returns the directory of the packed text.

    A model on the hub goes to the hub's cache. Settings that have been prepared before are not prepared again.

    Raises:
        UserError: no run directory, no such model or text, or weights that are missing or cut short.
    """
    if not config.run_dir:
        raise UserError("run_dir is empty: set it to the directory of the run")
    base = read_base(config.model)
    files = check_weights(fetch(config.model.path))
    text = TrainingText(config.run_dir, config.data, base)
    if config.finetune.data:
        windows = packed_windows(config.finetune, base.tokenizer, base.spec.vocab)
        log.info("%d windows of instruction records", len(windows))
    log.info("%s: %d weight files are whole", config.model.path, files)
    if text.load() is None:
        blocks = text.pack()
        log.info("%d blocks of %d tokens", *blocks.shape)
        return text.save(blocks)
    log.info("the text is prepared already")
    return text.directory


def summary(config: Config, result: Path) -> str:
    """What the command line prints at the end."""
    return f"prepared: {result}\nnext: nuteprune prune with the same settings"


def check_weights(directory: Path) -> int:
    """Open every safetensors file, which finds those that are cut short; returns how many files of weights there are.

    Raises:
        UserError: there is none, one is damaged, or one that the index names is missing.
    """
    files = {path.name for path in directory.glob("*.safetensors")}
    index = directory / INDEX
    if index.is_file():
        try:
            missing = set(read_json(index)["weight_map"].values()) - files
        except (CheckpointError, LookupError, TypeError, AttributeError):
            raise MachineError(f"{index} is damaged: fetch it again") from None
        if missing:
            raise MachineError(f"{directory / min(missing)} is missing or damaged: fetch it again")
    if not files:
        if pickled := weight_files(directory):
            return len(pickled)
        raise UserError(f"model.path {directory}: config.json but no weights (*.safetensors) there")
    for name in sorted(files):
        try:
            with safe_open(directory / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise MachineError(f"{directory / name} is missing or damaged ({error}): fetch it again") from None
    return len(files)
