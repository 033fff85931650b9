"""The finetune stage: a pruned student's LoRA, or all weights of the distilled model, on instruction records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import Config, Projection
from nuteprune.data.batches import BatchStream
from nuteprune.distilling.records import Instructing, OnRecords, windows
from nuteprune.distilling.trainer import add_gguf
from nuteprune.errors import UserError
from nuteprune.exporting.card import check_distilled
from nuteprune.model.layers import View
from nuteprune.model.loading import read_base
from nuteprune.model.losses import without_layers
from nuteprune.model.pairing import Answers, Losses
from nuteprune.parallel.distributed import discover
from nuteprune.planning.machine import with_micro_batch
from nuteprune.runs.directories import DISTILLED, distill_directory, finetune_directory, instruct_directory
from nuteprune.runs.rundir import Run
from nuteprune.runs.students import open_run, pruned_student
from nuteprune.training import fixed
from nuteprune.training.engine import RELATIVE_RATE
from nuteprune.training.loop import train
from nuteprune.training.teachers import constant_mode


def run(config: Config) -> Path:
    """Fine-tune the distilled model of the finished run in `config.run_dir`, or where there is none (or a rung is asked
    for) its student; returns the directory of the result.

    Raises:
        UserError: no finished run, another base model, a rung that the run never reached, or unusable records.
        As `train` otherwise.
    """
    trained = open_run(config.run_dir, config.model)
    base = read_base(trained.config.model)
    export = Path(config.export.output or trained.directory / "export")
    distilled = distill_directory(trained.directory) / DISTILLED
    if config.finetune.sparsity or not check_distilled(distilled, export):
        return train(settings(config, trained, base.spec), Finetuning, trained, base)
    result = train(whole_settings(config, trained), Instructing, trained, base, distilled)
    if discover().is_main:
        add_gguf(result, export, base)
    return result


def summary(config: Config, result: Path) -> str:
    """What the command line prints at the end."""
    if result.name == DISTILLED:
        return f"fine-tuned model: {result}\nnext: nuteprune evaluate {config.run_dir}"
    rung = f" --sparsity {config.finetune.sparsity:g}" if config.finetune.sparsity else ""
    return f"fine-tuned student: {result}\nnext: nuteprune export {config.run_dir}{rung}"


def settings(config: Config, trained: Run, spec: ArchSpec) -> Config:
    """The run's configuration with `finetune` in place of what training reads."""
    tune, old = config.finetune, trained.config
    rank = tune.lora_rank or old.lora.rank
    if rank < old.lora.rank:
        raise UserError(f"finetune.lora_rank {rank} is less than the pruned student's {old.lora.rank}, which it keeps")
    return fixed.settings(
        config, trained, finetune_directory(trained.directory, old.sparsity.target, tune.sparsity),
        finetune=tune,
        data=replace(old.data, source=tune.data, seq_len=tune.seq_len),
        train=replace(config.train, steps=tune.steps, epochs=tune.epochs, batch_size=tune.batch_size,
                      micro_batch=tune.micro_batch, lora_lr=tune.lr),
        loss=replace(without_layers(config.loss), kl_weight=tune.distill or 1.0),
        lora=replace(old.lora, targets=[name for name in get_args(Projection) if name in spec.lora_targets], rank=rank,
                     alpha=rank * old.lora.scaling),
        teacher=replace(old.teacher, mode=constant_mode(bool(tune.distill))),
    )  # fmt: skip


def whole_settings(config: Config, trained: Run) -> Config:
    """The same for the distilled model, of which all weights of the decoder are trained."""
    tune, old = config.finetune, trained.config
    return replace(
        old, run_dir=str(instruct_directory(trained.directory)), finetune=tune, export=config.export,
        deepspeed=config.distill.deepspeed or config.deepspeed, checkpoint=config.checkpoint, tracking=config.tracking,
        data=replace(old.data, source=tune.data, seq_len=tune.seq_len),
        train=replace(config.train, steps=tune.steps, epochs=tune.epochs, batch_size=tune.batch_size,
                      micro_batch=tune.micro_batch, lora_lr=tune.lr, lora_optimizer="scaled"),
        loss=replace(without_layers(config.loss), kl_weight=tune.distill),
    )  # fmt: skip


class Finetuning(OnRecords, fixed.FixedGates):
    """A student on instruction records, taught by answers and perhaps by the intact model."""

    stage = "finetune"
    remedy = "with a lower finetune.lr, or with model.dtype=float32"
    plan = staticmethod(with_micro_batch)
    relative_rate = RELATIVE_RATE / 2  # about the authors' 1e-4 on a 7B model; the whole rate forgets more
    free = ("recover", "checkpoint", "tracking", "export", "distill", "evaluate")

    @staticmethod
    def choose(config, trained, spec):
        """The final student or a rung, recovered where that is finished."""
        return pruned_student(config.export, trained, spec, config.finetune.sparsity)

    @staticmethod
    def batches(config, world, base) -> BatchStream:
        """Windows [3, T] of packed records."""
        return windows(config, world, base)

    def forward(self, batch: Tensor, teacher: View | None) -> Losses:
        """Losses of windows [b, 3, T]."""
        ids, labels, positions = batch.unbind(1)
        view = self.model.view(self.masks.fixed)
        return self.model(ids, view, teacher, self.config.loss, Answers(labels, positions))

    def facts(self) -> dict[str, Any]:
        """Its steps, tokens and records, and what it was before."""
        return {"steps": self.total, **self.amounts(), "recovered": self.student.facts.get("recovered", 0)}
