"""The trainer of students whose gates no longer change: their LoRA, on a stage's batches and with its teacher."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import Config
from nuteprune.data.batches import BatchStream
from nuteprune.masks import MaskSet, sparsity_of
from nuteprune.masks.schedule import Schedule
from nuteprune.model.layers import View
from nuteprune.model.loading import Base
from nuteprune.model.pairing import Losses
from nuteprune.parallel.distributed import World
from nuteprune.parallel.zero import load_paired, zero_settings
from nuteprune.runs.checkpoint import MANIFEST, sha256
from nuteprune.runs.directories import TUNED
from nuteprune.runs.rundir import Run
from nuteprune.runs.students import Student, export_gates
from nuteprune.runs.tuned import save_tuned
from nuteprune.training.engine import RELATIVE_RATE, Engine
from nuteprune.training.teachers import TEACHERS
from nuteprune.training.trainer import Masked

log = logging.getLogger(__name__)


def settings(config: Config, trained: Run, directory: Path, **own) -> Config:
    """The configuration of a finished run for a stage that trains a student of it on, in a directory of its own.

    Args:
        config: of this start.
        own: sections of the stage.
    """
    return replace(trained.config, run_dir=str(directory), deepspeed=config.deepspeed, checkpoint=config.checkpoint,
                   tracking=config.tracking, export=config.export, gates=export_gates(config.export, trained),
                   **own)  # fmt: skip


class FixedGates(Masked):
    """A stage that trains the LoRA of a student of the finished run above its directory.

    A stage says which student (`choose`), on which batches (`batches`) and what its result records (`facts`); the loss
    and the teacher are those of its configuration.
    """

    output = TUNED
    relative_rate: ClassVar[float] = RELATIVE_RATE
    """See `Engine`."""

    def __init__(self, *parts, trained: Run, student: Student, **state):
        super().__init__(*parts, **state)
        self.trained, self.student = trained, student

    @staticmethod
    @abstractmethod
    def choose(config: Config, trained: Run, spec: ArchSpec) -> Student:
        """The student that is trained on."""

    @staticmethod
    @abstractmethod
    def batches(config: Config, world: World, base: Base) -> BatchStream:
        """What it is trained on; every rank calls it, inside no collective."""

    @staticmethod
    @abstractmethod
    def plan(config: Config, spec: ArchSpec, world: World, zero: dict | None, steps: int) -> Config:
        """Its settings with a micro-batch, planned in a room above this one."""

    @abstractmethod
    def facts(self) -> dict:
        """What the result's tuned.json says of the training."""

    @classmethod
    def build(cls, config: Config, world: World, trained: Run, base: Base) -> FixedGates:
        """Load the model, the student of the run and its batches, at step 0."""
        spec = base.spec
        with world.together():
            student = cls.choose(config, trained, spec)
            zero = zero_settings(config, spec, world)
        stream = cls.batches(config, world, base)
        schedule = Schedule.of(config, stream.steps_per_epoch)
        config = cls.plan(config, spec, world, zero, schedule.total)
        model = load_paired(base, config.lora, world, zero, config.train.activation_checkpointing)
        model.update.load(student.lora)
        masks = MaskSet(spec, config.gates).to(world.device)
        masks.fix(student.gates)
        engine = Engine(model, masks, None, schedule, world, bool(config.deepspeed), cls.relative_rate)
        teacher = TEACHERS[config.teacher.mode](spec, config.teacher, model.scaling, world.device, model.dtype)
        log.info("%s at sparsity %.4f: %d sequences, %d steps, LoRA's rate %g", cls.stage,
                 sparsity_of(spec, student.gates), len(stream.blocks), schedule.total, engine.peak)  # fmt: skip
        return cls(config, world, model, engine, stream, schedule, masks=masks, teacher=teacher, trained=trained,
                   student=student)  # fmt: skip

    @cached_property
    def inputs(self) -> dict[str, str | None]:
        """The pruned student too."""
        return super().inputs | {"the pruned student": sha256(self.trained.directory / "pruned" / MANIFEST)}

    def start(self) -> None:
        """Nothing to do: the student is there."""

    def train_step(self) -> dict[str, float]:
        """One optimizer step."""
        teacher = self.teacher.view(self.step, self.total, 0.0)
        metrics = self.accumulate(lambda batch: self.forward(batch, teacher))
        return metrics | self.update(metrics["loss"])

    def forward(self, batch: Tensor, teacher: View | None) -> Losses:
        """Losses of token ids [b, T]."""
        return self.model(batch, self.model.view(self.masks.fixed), teacher, self.config.loss)

    def finish(self) -> Path:
        """Save the student."""
        config, spec, gates = self.config, self.model.spec, self.masks.fixed
        assert gates is not None
        facts = self.facts() | {"sparsity": sparsity_of(spec, gates), "skipped_steps": self.bad_total}
        return save_tuned(Path(config.run_dir), config, self.trained, spec, gates, self.model.update.pairs(), facts)
