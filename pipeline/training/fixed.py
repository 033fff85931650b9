"""What fine-tuning and recovery share: the LoRA of a finished run's student in training, its gates fixed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from nuteprune.masks import MaskSet
from nuteprune.model.lora import Update
from nuteprune.runs.checkpoint import MANIFEST, sha256
from nuteprune.runs.directories import TUNED
from nuteprune.runs.rundir import Run
from nuteprune.training.loop import Trainer
from nuteprune.training.resume import load_state, save_state
from nuteprune.training.teachers import TeacherBank


class FixedGates(Trainer):
    """A stage that trains the LoRA of a student of `trained`, whose gates `masks` no longer change."""

    output = TUNED
    outputs = ("checkpoints", TUNED)

    def __init__(self, *parts, trained: Run, masks: MaskSet, bank: TeacherBank):
        super().__init__(*parts)
        self.trained, self.masks, self.bank = trained, masks, bank

    @cached_property
    def inputs(self) -> dict[str, str | None]:
        """The pruned student too."""
        return super().inputs | {"the pruned student": sha256(self.trained.directory / "pruned" / MANIFEST)}

    def start(self) -> None:
        """Nothing to do: the student is there."""

    def save(self, directory: Path, counters: dict) -> None:
        """Gates, LoRA, its optimizer and counters."""
        save_state(directory, self.config, *self._parts(), counters)

    def load(self, directory: Path) -> dict[str, float]:
        """Restore what `save` wrote; returns the counters."""
        return load_state(directory, *self._parts())

    def _parts(self) -> tuple[MaskSet, None, Update, dict[str, torch.optim.Optimizer], TeacherBank]:
        return self.masks, None, self.model.update, self.engine.optimizers, self.bank
