"""The trainer of a distilled model on instruction records, and what every stage on records has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from nuteprune.config import Config
from nuteprune.data.batches import BatchStream
from nuteprune.data.instructions import packed_windows
from nuteprune.distilling.trainer import Distilling, relative_rate
from nuteprune.errors import UserError
from nuteprune.model.loading import Base
from nuteprune.model.losses import IGNORE
from nuteprune.model.pairing import Answers, Losses
from nuteprune.parallel.distributed import World
from nuteprune.runs.fingerprint import fingerprint
from nuteprune.runs.rundir import Run
from nuteprune.training.trainer import Trainer


def windows(config: Config, world: World, base: Base) -> BatchStream:
    """Windows [3, T] of packed records."""
    with world.together():
        if config.model.attention == "flash_attention_2" and config.finetune.micro_batch != 1:
            raise UserError("finetune.micro_batch: flash attention keeps records apart in one window only: set it to 1")
        found = packed_windows(config.finetune, base.tokenizer, base.spec.vocab)
        return BatchStream(found, config.train.batch_size, config.seed, world.rank, world.size)


class OnRecords(Trainer):
    """A stage on windows of records: each answer token of the global batch counts the same on every rank."""

    def __init__(self, *parts, **state):
        super().__init__(*parts, **state)
        answers = (self.stream.blocks[:, 1] != IGNORE).sum(1)
        self.answer_counts = BatchStream(answers, self.config.train.batch_size, self.config.seed)
        """Answer tokens of each window of the global batch, in the order of `stream`."""

    def accumulate(self, forward: Callable[[Tensor], Losses]) -> dict[str, float]:
        """Backward of this step's windows; the answer tokens of the global batch too."""
        return super().accumulate(forward) | {"answer_tokens": float(self.answer_counts.batch(self.step).sum())}

    def share(self, micro_batch: Tensor, batch: Tensor) -> float:
        """Weight of a micro-batch's mean loss in that of this rank's batch."""
        own = int((micro_batch[:, 1] != IGNORE).sum())
        return own * self.world.size / int(self.answer_counts.batch(self.step).sum())

    def amounts(self) -> dict[str, Any]:
        """Tokens and records of all steps."""
        config = self.config
        return {
            "tokens": self.total * config.train.batch_size * config.data.seq_len,
            "answer_tokens": sum(int(self.answer_counts.batch(step).sum()) for step in range(self.total)),
            "data": config.finetune.data,
        }


class Instructing(OnRecords, Distilling):
    """All weights of a distilled model on records; on answers the intact model teaches, by `finetune.distill`."""

    stage = "finetune"
    remedy = "with a lower finetune.lr, or with model.dtype=float32"
    free = ("recover", "export", "distill", "checkpoint", "tracking", "evaluate")
    answers = True

    @staticmethod
    def batches(config: Config, world: World, trained: Run, base: Base) -> BatchStream:
        """Windows [3, T] of packed records."""
        return windows(config, world, base)

    def fit(self, whole: PreTrainedModel | None) -> None:
        """Nothing: it has been."""

    def rate(self) -> float:
        """That of the settings, or half of distillation's, for the whole rate forgets more. Collective."""
        return self.config.train.lora_lr or relative_rate(self.student, self.world) / 2

    def forward(self, batch: Tensor) -> Losses:
        """Losses of windows [b, 3, T]."""
        ids, labels, positions = batch.unbind(1)
        return self.losses(ids, Answers(labels, positions))

    def facts(self) -> dict[str, Any]:
        """What the result's record says of the training."""
        return {"finetuned": self.total, "instructed_from": fingerprint(str(self.export))}

    def card_row(self) -> tuple[str, str]:
        """What its card says of it."""
        learned = self.amounts()["answer_tokens"]
        return "Fine-tuned", f"all weights, {self.total:,} steps on records, {learned:,} answer tokens"
