"""The recover stage: rungs of a run trained on from their snapshots on the training text, their gates fixed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nuteprune.config import Config
from nuteprune.data.batches import BatchStream
from nuteprune.data.prepared import TrainingText
from nuteprune.errors import UserError
from nuteprune.model.loading import read_base
from nuteprune.parallel.distributed import discover
from nuteprune.planning.machine import with_micro_batch
from nuteprune.runs.directories import TUNED, finetune_directory, recover_directory
from nuteprune.runs.rundir import Run
from nuteprune.runs.students import open_run, snapshot_student
from nuteprune.training import fixed
from nuteprune.training.inputs import shared_blocks
from nuteprune.training.loop import train
from nuteprune.training.teachers import TEACHERS, constant_mode

SHARE = 0.4
"""Steps of a rung, of those of its run, where `recover.steps` is 0."""


def run(config: Config) -> list[Path]:
    """Recover each rung of `recover.ladder` that is not finished yet; returns the directories of the results.

    Raises:
        UserError: no rung or one out of range, no finished run, one without LoRA, another base model, a rung that the
            run never reached or that is fine-tuned already, or several rungs under a launcher. As `train` otherwise.
    """
    rungs = sorted(set(config.recover.ladder))
    if not rungs or not all(0 < rung < 1 for rung in rungs):
        raise UserError(f"recover.ladder: give sparsities between 0 and 1 (--ladder 0.1,0.2), got {rungs}")
    if len(rungs) > 1 and discover().size > 1:
        raise UserError("several ranks recover one rung in a start: give one with --sparsity")
    trained = open_run(config.run_dir, config.model)
    if not trained.config.lora.targets:
        raise UserError("the run has no LoRA (lora.targets=[]), and nothing else of a rung learns: fine-tune it")
    base = read_base(trained.config.model)
    for rung in rungs:
        # A rung that is out of reach costs no training of the others.
        snapshot_student(config.export, trained, base.spec, rung)
        check_untuned(trained, rung)
    return [train(settings(config, trained, rung), Recovering, trained, base) for rung in rungs]


def check_untuned(trained: Run, rung: float) -> None:
    """Raise `UserError` for a rung whose fine-tuning has begun without its recovery: that is what would be exported."""
    places = trained.directory, trained.config.sparsity.target, rung
    tuned = finetune_directory(*places)
    if tuned.is_dir() and not (recover_directory(*places) / TUNED).is_dir():
        raise UserError(f"{tuned} goes on from the rung as it is: remove it, recover, and fine-tune anew")


def summary(config: Config, result: list[Path]) -> str:
    """What the command line prints at the end."""
    rungs = ",".join(f"{rung:g}" for rung in config.recover.ladder)
    recovered = "\n".join(f"recovered: {path}" for path in result)
    return f"{recovered}\nnext: nuteprune export {config.run_dir} --ladder {rungs}"


def settings(config: Config, trained: Run, rung: float) -> Config:
    """The run's configuration for one rung."""
    old, wanted = trained.config, config.recover
    steps = wanted.steps or max(1, round(SHARE * int(trained.facts["steps"])))
    return fixed.settings(
        config, trained, recover_directory(trained.directory, old.sparsity.target, rung),
        recover=replace(wanted, ladder=[rung]),
        train=replace(config.train, steps=steps),
        teacher=replace(old.teacher, mode=constant_mode(TEACHERS[old.teacher.mode].taught)),
    )  # fmt: skip


class Recovering(fixed.FixedGates):
    """A rung on the training text, taught with the run's own loss."""

    stage = "recover"
    plan = staticmethod(with_micro_batch)
    free = ("checkpoint", "tracking", "export", "distill", "evaluate", "finetune")

    @staticmethod
    def choose(config, trained, spec):
        """The rung as pruning left it."""
        return snapshot_student(config.export, trained, spec, config.recover.ladder[0])

    @staticmethod
    def batches(config, world, base) -> BatchStream:
        """The text in another order than that of pruning, whose last batches the snapshot has not seen."""
        text = TrainingText(str(Path(config.run_dir).parent), config.data, base)
        blocks = shared_blocks(text, world, config.train.batch_size)
        with world.together():
            return BatchStream(blocks, config.train.batch_size, config.seed + 1, world.rank, world.size)

    def facts(self) -> dict[str, Any]:
        """Its steps."""
        return {"recovered": self.total}
