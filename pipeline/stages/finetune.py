"""The finetune stage: LoRA of a pruned student on instruction records, its gates fixed and removed units skipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import Config, Projection
from nuteprune.data.batches import BatchStream
from nuteprune.data.instructions import packed_windows
from nuteprune.errors import UserError
from nuteprune.model.layers import View
from nuteprune.model.loading import read_base
from nuteprune.model.losses import IGNORE, without_layers
from nuteprune.model.pairing import Answers, Losses
from nuteprune.planning.machine import with_micro_batch
from nuteprune.runs.directories import finetune_directory
from nuteprune.runs.rundir import Run
from nuteprune.runs.students import open_run, pruned_student
from nuteprune.training import fixed
from nuteprune.training.engine import RELATIVE_RATE
from nuteprune.training.loop import train
from nuteprune.training.teachers import constant_mode


def run(config: Config) -> Path:
    """Fine-tune a student of the finished run in `config.run_dir`; returns the directory of the result.

    Raises:
        UserError: no finished run, another base model, a rung that the run never reached, or unusable records.
        As `train` otherwise.
    """
    trained = open_run(config.run_dir, config.model)
    base = read_base(trained.config.model)
    return train(settings(config, trained, base.spec), Finetuning, trained, base)


def summary(config: Config, result: Path) -> str:
    """What the command line prints at the end."""
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


class Finetuning(fixed.FixedGates):
    """A student on instruction records, taught by answers and perhaps by the intact model."""

    stage = "finetune"
    remedy = "with a lower finetune.lr, or with model.dtype=float32"
    plan = staticmethod(with_micro_batch)
    relative_rate = RELATIVE_RATE / 2  # about the authors' 1e-4 on a 7B model; the whole rate forgets more
    free = ("recover", "checkpoint", "tracking", "export", "distill", "evaluate")

    def __init__(self, *parts, **state):
        super().__init__(*parts, **state)
        answers = (self.stream.blocks[:, 1] != IGNORE).sum(1)
        self.answers = BatchStream(answers, self.config.train.batch_size, self.config.seed)
        """Answer tokens of each window of the global batch, in the order of `stream`."""

    @staticmethod
    def choose(config, trained, spec):
        """The final student or a rung, recovered where that is finished."""
        return pruned_student(config.export, trained, spec, config.finetune.sparsity)

    @staticmethod
    def batches(config, world, base) -> BatchStream:
        """Windows [3, T] of packed records."""
        with world.together():
            if config.model.attention == "flash_attention_2" and config.finetune.micro_batch != 1:
                raise UserError(
                    "finetune.micro_batch: flash attention keeps records apart in one window only: set it to 1"
                )
            windows = packed_windows(config.finetune, base.tokenizer, base.spec.vocab)
            return BatchStream(windows, config.train.batch_size, config.seed, world.rank, world.size)

    def train_step(self) -> dict[str, float]:
        """One optimizer step."""
        return super().train_step() | {"answer_tokens": float(self.answers.batch(self.step).sum())}

    def forward(self, batch: Tensor, teacher: View | None) -> Losses:
        """Losses of windows [b, 3, T]."""
        ids, labels, positions = batch.unbind(1)
        view = self.model.view(self.masks.fixed)
        return self.model(ids, view, teacher, self.config.loss, Answers(labels, positions))

    def share(self, micro_batch: Tensor, batch: Tensor) -> float:
        """Weight of a micro-batch, such that each answer token of the global batch counts the same on every rank."""
        own = int((micro_batch[:, 1] != IGNORE).sum())
        return own * self.world.size / int(self.answers.batch(self.step).sum())

    def facts(self) -> dict[str, Any]:
        """Its steps, tokens and records, and what it was before."""
        config = self.config
        return {
            "steps": self.total,
            "tokens": self.total * config.train.batch_size * config.data.seq_len,
            "answer_tokens": sum(int(self.answers.batch(step).sum()) for step in range(self.total)),
            "data": config.finetune.data,
            "recovered": self.student.facts.get("recovered", 0),
        }
