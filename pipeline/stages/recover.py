"""The recover stage: rungs of a run trained on from their snapshots on the training text, their gates fixed."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nuteprune.config import Config, ConfigError
from nuteprune.data.prepared import TrainingText
from nuteprune.data.text import BatchStream
from nuteprune.masks import MaskSet, sparsity_of
from nuteprune.masks.schedule import Schedule
from nuteprune.model.layers import View
from nuteprune.model.loading import read_base
from nuteprune.model.pairing import Losses
from nuteprune.parallel.distributed import World, discover
from nuteprune.parallel.zero import load_paired, zero_settings
from nuteprune.runs.directories import recover_directory
from nuteprune.runs.rundir import Run
from nuteprune.runs.students import export_gates, open_run, snapshot_student
from nuteprune.runs.tuned import save_tuned
from nuteprune.training.engine import Engine
from nuteprune.training.fixed import FixedGates
from nuteprune.training.inputs import shared_blocks
from nuteprune.training.loop import train
from nuteprune.training.teachers import TeacherBank

log = logging.getLogger(__name__)

SHARE = 0.4
"""Steps of a rung, of those of its run, where `recover.steps` is 0."""


def run(config: Config) -> list[Path]:
    """Recover each rung of `recover.ladder` that is not finished yet; returns the directories of the results.

    Raises:
        ConfigError: no rung or one out of range, no finished run, another base model, a rung that the run never
            reached, or several rungs under a launcher. As `train` otherwise.
    """
    rungs = sorted(set(config.recover.ladder))
    if not rungs or not all(0 < rung < 1 for rung in rungs):
        raise ConfigError(f"recover.ladder: give sparsities between 0 and 1 (--ladder 0.1,0.2), got {rungs}")
    if len(rungs) > 1 and discover().size > 1:
        raise ConfigError("several ranks recover one rung in a start: give one with --sparsity")
    trained = open_run(config.run_dir, config.model)
    spec = read_base(trained.config.model).spec
    for rung in rungs:
        # A rung that is out of reach costs no training of the others.
        snapshot_student(config.export, trained, spec, rung)
    return [train(settings(config, trained, rung), Recovering) for rung in rungs]


def summary(config: Config, result: list[Path]) -> str:
    """What the command line prints at the end."""
    rungs = ",".join(f"{rung:g}" for rung in config.recover.ladder)
    recovered = "\n".join(f"recovered: {path}" for path in result)
    return f"{recovered}\nnext: nuteprune export {config.run_dir} --ladder {rungs}"


def settings(config: Config, trained: Run, rung: float) -> Config:
    """The run's configuration for one rung, in a directory of its own."""
    old, wanted = trained.config, config.recover
    steps = wanted.steps or max(1, round(SHARE * int(trained.facts["steps"])))
    return replace(
        old,
        run_dir=str(recover_directory(trained.directory, old.sparsity.target, rung)),
        deepspeed=config.deepspeed,
        recover=replace(wanted, ladder=[rung]), checkpoint=config.checkpoint, tracking=config.tracking,
        export=config.export,
        train=replace(old.train, steps=steps, lora_lr=wanted.lr or old.train.lora_lr, ranks=config.train.ranks,
                      micro_batch=config.train.micro_batch),
        teacher=replace(old.teacher, mode="none" if old.teacher.mode == "none" else "intact"),
        gates=export_gates(config.export, trained),
    )  # fmt: skip


class Recovering(FixedGates):
    """The LoRA of a rung whose gates no longer change, taught by the intact model with the run's own loss."""

    stage = "recover"
    free = ("checkpoint", "tracking", "export", "evaluate", "finetune")

    @classmethod
    def build(cls, config: Config, world: World) -> Recovering:
        """Load the model, the rung and the text, at step 0."""
        run_dir = str(Path(config.run_dir).parent)
        with world.together():
            trained = open_run(run_dir, config.model)
            base = read_base(config.model)
            spec = base.spec
            student = snapshot_student(config.export, trained, spec, config.recover.ladder[0])
            zero = zero_settings(config, spec, world)
            text = TrainingText(run_dir, config.data, base)
        blocks = shared_blocks(text, world, config.train.batch_size)
        with world.together():
            # Another order than that of pruning, whose last batches the snapshot has not seen.
            stream = BatchStream(blocks, config.train.batch_size, config.seed + 1, world.rank, world.size)
        model = load_paired(base, config.lora, world, zero, config.train.activation_checkpointing)
        model.update.load(student.lora)
        masks = MaskSet(spec, config.gates).to(world.device)
        masks.fix(student.gates)
        schedule = Schedule.of(config, stream.steps_per_epoch)
        engine = Engine(model, masks, None, schedule, world, bool(config.deepspeed))
        bank = TeacherBank(spec, config.teacher, model.scaling, world.device, model.dtype)
        log.info("recovering at sparsity %.4f: %d steps", sparsity_of(spec, student.gates), config.train.steps)
        return cls(config, world, model, engine, stream, schedule, trained=trained, masks=masks, bank=bank)

    def train_step(self) -> dict[str, float]:
        """One optimizer step."""
        teacher = None if self.config.teacher.mode == "none" else self.bank.activate(None)
        metrics = self.accumulate(lambda ids: self.forward(ids, teacher))
        return metrics | self.update(metrics["loss"])

    def forward(self, ids: Tensor, teacher: View | None) -> Losses:
        """Losses of token ids [b, T]."""
        return self.model(ids, self.model.view(self.masks.fixed), teacher, self.config.loss)

    def finish(self) -> Path:
        """Save the recovered rung."""
        config, gates = self.config, self.masks.fixed
        assert gates is not None
        facts: dict[str, Any] = {
            "recovered": self.total,
            "sparsity": sparsity_of(self.model.spec, gates),
            "skipped_steps": self.bad_total,
        }
        lora = self.model.update.pairs()
        return save_tuned(Path(config.run_dir), config, self.trained, self.model.spec, gates, lora, facts)
