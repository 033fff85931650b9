"""The finetune stage: LoRA of a pruned student on instruction records, its gates fixed and removed units skipped."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from nuteprune.config import Config, ConfigError, Projection
from nuteprune.data.instructions import packed_windows
from nuteprune.data.text import BatchStream
from nuteprune.masks import MaskSet, sparsity_of
from nuteprune.masks.schedule import Schedule
from nuteprune.model.distill import IGNORE
from nuteprune.model.layers import View
from nuteprune.model.loading import read_base
from nuteprune.model.pairing import Answers, Losses
from nuteprune.parallel.distributed import World
from nuteprune.parallel.zero import load_paired, zero_settings
from nuteprune.runs.directories import finetune_directory
from nuteprune.runs.rundir import Run
from nuteprune.runs.students import export_gates, open_run, pruned_student
from nuteprune.runs.tuned import save_tuned
from nuteprune.training.engine import Engine
from nuteprune.training.fixed import FixedGates
from nuteprune.training.loop import train
from nuteprune.training.teachers import TeacherBank

log = logging.getLogger(__name__)


def run(config: Config) -> Path:
    """Fine-tune a student of the finished run in `config.run_dir`; returns the directory of the result.

    Raises:
        ConfigError: no finished run, another base model, a rung that the run never reached, or unusable records.
        As `train` otherwise.
    """
    return train(settings(config, open_run(config.run_dir, config.model)), Finetuning)


def summary(config: Config, result: Path) -> str:
    """What the command line prints at the end."""
    rung = f" --sparsity {config.finetune.sparsity:g}" if config.finetune.sparsity else ""
    return f"fine-tuned student: {result}\nnext: nuteprune export {config.run_dir}{rung}"


def settings(config: Config, trained: Run) -> Config:
    """The run's configuration with `finetune` in place of what training reads, in a directory of its own."""
    tune, old = config.finetune, trained.config
    rank = tune.lora_rank or old.lora.rank
    if rank < old.lora.rank:
        raise ConfigError(
            f"finetune.lora_rank {rank} is less than the pruned student's {old.lora.rank}, which it keeps"
        )
    possible = read_base(old.model).spec.lora_targets
    return replace(
        old,
        run_dir=str(finetune_directory(trained.directory, old.sparsity.target, tune.sparsity)),
        deepspeed=config.deepspeed,
        finetune=tune, checkpoint=config.checkpoint, tracking=config.tracking, export=config.export,
        data=replace(old.data, source=tune.data, seq_len=tune.seq_len),
        train=replace(config.train, steps=tune.steps, epochs=tune.epochs, batch_size=tune.batch_size,
                      micro_batch=tune.micro_batch, lora_lr=tune.lr),
        loss=replace(config.loss, layer_weight=0.0, kl_weight=tune.distill or 1.0),
        lora=replace(old.lora, targets=[name for name in get_args(Projection) if name in possible], rank=rank,
                     alpha=rank * old.lora.alpha / old.lora.rank),
        teacher=replace(old.teacher, mode="intact" if tune.distill else "none"),
        gates=export_gates(config.export, trained),
    )  # fmt: skip


class Finetuning(FixedGates):
    """The LoRA of a student whose gates no longer change, taught by answers and perhaps by the intact model."""

    stage = "finetune"
    free = ("recover", "checkpoint", "tracking", "export", "evaluate")

    def __init__(self, *parts, recovered: int, **state):
        super().__init__(*parts, **state)
        self.recovered = recovered
        answers = (self.stream.blocks[:, 1] != IGNORE).sum(1)
        self.answers = BatchStream(answers, self.config.train.batch_size, self.config.seed)
        """Answer tokens of each window of the global batch, in the order of `stream`."""

    @classmethod
    def build(cls, config: Config, world: World) -> Finetuning:
        """Load the model, the student and the records, at step 0."""
        with world.together():
            trained = open_run(Path(config.run_dir).parent, config.model)
            base = read_base(config.model)
            spec = base.spec
            student = pruned_student(config.export, trained, spec, config.finetune.sparsity)
            zero = zero_settings(config, spec, world)
            if config.model.attention == "flash_attention_2" and config.finetune.micro_batch != 1:
                raise ConfigError(
                    "finetune.micro_batch: flash attention keeps records apart in one window only: set it to 1"
                )
            windows = packed_windows(config.finetune, base.tokenizer)
            stream = BatchStream(windows, config.train.batch_size, config.seed, world.rank, world.size)
        schedule = Schedule.of(config, stream.steps_per_epoch)
        model = load_paired(base, config.lora, world, zero, config.train.activation_checkpointing)
        model.update.load(student.lora)
        masks = MaskSet(spec, config.gates).to(world.device)
        masks.fix(student.gates)
        engine = Engine(model, masks, None, schedule, world, bool(config.deepspeed))
        bank = TeacherBank(spec, config.teacher, model.scaling, world.device, model.dtype)
        log.info("fine-tuning at sparsity %.4f: %d windows, %d steps", sparsity_of(spec, student.gates), len(windows),
                 schedule.total)  # fmt: skip
        return cls(config, world, model, engine, stream, schedule, trained=trained, masks=masks, bank=bank,
                   recovered=student.facts.get("recovered", 0))  # fmt: skip

    def train_step(self) -> dict[str, float]:
        """One optimizer step."""
        teacher = self.bank.activate(None) if self.config.teacher.mode == "intact" else None
        metrics = self.accumulate(lambda windows: self.forward(windows, teacher))
        del metrics["layer_loss"]
        metrics |= self.update(metrics["loss"])
        return metrics | {"answer_tokens": float(self.answers.batch(self.step).sum())}

    def forward(self, windows: Tensor, teacher: View | None) -> Losses:
        """Losses of windows [b, 3, T]."""
        ids, labels, positions = windows.unbind(1)
        view = self.model.view(self.masks.fixed)
        return self.model(ids, view, teacher, self.config.loss, Answers(labels, positions))

    def share(self, micro_batch: Tensor, batch: Tensor) -> float:
        """Weight of a micro-batch, such that each answer token of the global batch counts the same on every rank."""
        own = int((micro_batch[:, 1] != IGNORE).sum())
        return own * self.world.size / int(self.answers.batch(self.step).sum())

    def finish(self) -> Path:
        """Save the fine-tuned student."""
        config, gates = self.config, self.masks.fixed
        assert gates is not None
        facts: dict[str, Any] = {
            "steps": self.total,
            "tokens": self.total * config.train.batch_size * config.data.seq_len,
            "answer_tokens": sum(int(self.answers.batch(step).sum()) for step in range(self.total)),
            "data": config.finetune.data,
            "recovered": self.recovered,
            "sparsity": sparsity_of(self.model.spec, gates),
            "skipped_steps": self.bad_total,
        }
        lora = self.model.update.pairs()
        return save_tuned(Path(config.run_dir), config, self.trained, self.model.spec, gates, lora, facts)
