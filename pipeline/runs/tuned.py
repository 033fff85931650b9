"""Students of a run that were trained on, fine-tuned or recovered, on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from nuteprune.arch import ArchSpec
from nuteprune.config import Config, load_config
from nuteprune.errors import MachineError, UserError, first_line
from nuteprune.masks import Gates
from nuteprune.model.layers import LoraWeights
from nuteprune.runs.checkpoint import MANIFEST, atomic_directory, read_json, sha256, verify
from nuteprune.runs.directories import TUNED
from nuteprune.runs.rundir import (
    DAMAGED,
    Run,
    load_adapter,
    load_gates,
    save_adapter,
    save_config,
    save_gates,
)


class Tuned(NamedTuple):
    """What training on changes of a student: see `students.Student`."""

    gates: Gates
    lora: LoraWeights
    scaling: float
    facts: Mapping


def save_tuned(
    directory: Path, config: Config, trained: Run, spec: ArchSpec, gates: Gates, lora: LoraWeights, facts: dict
) -> Path:
    """Write a fine-tuned or recovered student of a run to `<directory>/tuned`, atomically; `facts` go to tuned.json."""
    with atomic_directory(directory / TUNED) as temporary:
        save_config(temporary / "config.yaml", config)
        save_gates(temporary / "gates.safetensors", gates, {})
        save_adapter(temporary / "adapter", lora, config, spec)
        facts = {**facts, "pruned": sha256(trained.directory / "pruned" / MANIFEST)}
        (temporary / "tuned.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return directory / TUNED


def load_tuned(directory: Path, trained: Run, again: str) -> Tuned:
    """Read what `save_tuned` wrote; raises `UserError` where it is missing, damaged, or of an earlier pruning.

    `again` says how to make it anew.
    """
    if not directory.is_dir():
        raise UserError(f"no finished fine-tuning in {directory.parent}: {again} (finetune.sparsity names a rung)")
    try:
        verify(directory)
        gates, _ = load_gates(directory / "gates.safetensors")
        facts = read_json(directory / "tuned.json")
        lora, config = load_adapter(directory / "adapter"), load_config(directory / "config.yaml").lora
        pruned = facts["pruned"]
    except DAMAGED as error:
        raise MachineError(f"the student in {directory} is damaged: {first_line(error)}; {again}") from None
    if pruned != sha256(trained.directory / "pruned" / MANIFEST):
        raise UserError(
            f"{directory} comes from an earlier pruning of this run: remove {directory.parent} and {again}, or "
            "set export.source=pruned"
        )
    return Tuned(gates, lora, config.scaling, facts)
