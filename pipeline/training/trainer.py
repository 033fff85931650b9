"""A stage in training: what one step computes, its sums over micro-batches and ranks, and what a bad step leads to."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import cached_file

from nuteprune.config import Config
from nuteprune.data.batches import BatchStream
from nuteprune.kernels.api import into_grad
from nuteprune.masks import MaskSet
from nuteprune.masks.schedule import Schedule
from nuteprune.model.lora import Update
from nuteprune.model.pairing import Losses, PairedModel
from nuteprune.parallel.distributed import World
from nuteprune.runs.checkpoint import Checkpoints, Facts, seconds_between, sha256
from nuteprune.runs.fingerprint import fingerprint
from nuteprune.training.engine import Engine, Multipliers
from nuteprune.training.memory import TooLarge, is_out_of_memory, remember
from nuteprune.training.resume import load_state, save_state
from nuteprune.training.signals import Preempted, Stop
from nuteprune.training.teachers import Teacher
from nuteprune.training.tracking import progress_bar
from nuteprune.training.weights import WeightsEngine

log = logging.getLogger(__name__)

MAX_BAD_STEPS = 10
"""Steps in a row with a NaN or infinite loss or gradient after which a run ends."""


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says why and where the last good state is."""


class Trainer(ABC):
    """One stage in training.

    Args:
        config: the run's settings.
        world: this rank's place.
        model: frozen base with the LoRA in training.
        engine: its optimizers.
        stream: batches by step.
        schedule: the run's steps.
    """

    stage: ClassVar[str]
    """Prefix of the scalars' names."""
    output: ClassVar[str]
    """Name of the finished result below the run directory."""
    remedy: ClassVar[str] = "with a lower train.lora_lr, or with model.dtype=float32"
    """Of losses that are not finite: how to start anew."""
    free: ClassVar[tuple[str, ...]]
    """Sections of the configuration that may change between two starts of one run."""

    def __init__(
        self, config: Config, world: World, model: PairedModel, engine: Engine | WeightsEngine, stream: BatchStream,
        schedule: Schedule,
    ):  # fmt: skip
        self.config, self.world, self.model, self.engine = config, world, model, engine
        self.partitioned = bool(model.partitioning)
        """Whether ranks gather weights in a step, so that none can go through it again by itself."""
        self.stream, self.schedule, self.total = stream, schedule, schedule.total
        self.checkpoints = Checkpoints(Path(config.run_dir) / "checkpoints", config.checkpoint.keep)
        self.step = self.bad_in_a_row = self.bad_total = 0
        self.micro_batch = config.train.micro_batch or stream.local_size
        """Sequences of a forward pass."""
        self.stop, self.stopping = Stop(), False
        self.saved, self.saving_seconds = time.monotonic(), 0.0
        """When the last checkpoint was written, and how long that took."""
        self.overdue = False
        """Whether rank 0 has not written one for so long that all save behind this step."""

    @classmethod
    @abstractmethod
    def build(cls, config: Config, world: World, *known) -> Trainer:
        """Load the model and data and put a run together, at step 0; `known`: what the stage has read before."""

    @abstractmethod
    def start(self) -> None:
        """What is done before the steps: in a new run, and what no checkpoint holds in one that goes on."""

    @abstractmethod
    def train_step(self) -> dict[str, float]:
        """Step `self.step`: forward, backward, update; returns the scalars to log."""

    @abstractmethod
    def before_finish(self) -> None:
        """What all ranks do for `finish`. Collective."""

    @abstractmethod
    def finish(self) -> Path:
        """Write the result after the last step, on rank 0; returns its directory."""

    @abstractmethod
    def before_save(self) -> Facts:
        """What all ranks do for `save`; returns the facts of files that they have written, where `save` puts them.

        Collective.
        """

    @abstractmethod
    def save(self, directory: Path, counters: dict) -> None:
        """Write all that `load` needs, on rank 0."""

    @abstractmethod
    def load(self, directory: Path) -> dict[str, float]:
        """Restore in place what `save` wrote, on each rank by itself; returns the counters."""

    @cached_property
    def inputs(self) -> dict[str, str | None]:
        """Fingerprints of what the state is worth nothing without: the base model and the text or records."""
        base = self.config.model.path
        data = hashlib.sha256(self.stream.blocks.contiguous().numpy()).hexdigest()
        sizes = sha256(Path(cached_file(base, "config.json")))
        return {"model.path": fingerprint(base), "config.json of model.path": sizes, "data.source": data}

    def halt(self) -> None:
        """End here, where nothing has been done that is not saved, if a signal came to any rank."""
        if self.world.any(bool(self.stop.received)):
            raise Preempted(self.stop.nothing)

    def progress(self, metrics: dict[str, float]) -> dict[str, str]:
        """What stands behind the progress bar."""
        return {"loss": f"{metrics['loss']:.3f}"}

    def pictures(self) -> dict[str, Tensor]:
        """Gates [L, U] in 0..1 to draw, by kind."""
        return {}

    def progress_bar(self, name: str, unit: str, total: int, done: int = 0) -> AbstractContextManager[tqdm]:
        """A bar on rank 0 unless `tracking.progress` is off."""
        return progress_bar(name, unit, total, done, shown=self.config.tracking.progress and self.world.is_main)

    def share(self, micro_batch: Tensor, batch: Tensor) -> float:
        """Weight of a micro-batch's mean loss in that of this rank's batch."""
        return len(micro_batch) / len(batch)

    def accumulate(self, forward: Callable[[Tensor], Losses]) -> dict[str, float]:
        """Backward of this step's micro-batches; returns the loss and its terms, averaged over the global batch.

        With them travels whether any rank was asked to stop, and whether a checkpoint is due by rank 0's clock, so that
        all of them stop or save at the same step.

        Args:
            forward: losses of a micro-batch [b, T]; all of a step have the same terms.
        """
        found = self._backward(forward)
        while found is None:
            torch.cuda.empty_cache()  # behind `_backward`, whose losses refer to what fills the memory
            found = self._backward(forward)
        names, sums = found
        sums[-2] = self.world.is_main and time.monotonic() - self.saved >= seconds_between(self.saving_seconds)
        sums[-1] = bool(self.stop.received)
        *means, overdue, stopping = self.world.mean(sums).tolist()
        self.overdue, self.stopping = overdue > 0, stopping > 0
        return dict(zip(("loss", *(f"{name}_loss" for name in names)), means, strict=True))

    def _backward(self, forward: Callable[[Tensor], Losses]) -> tuple[list[str], Tensor] | None:
        """The terms' names, and sums over the rank's batch of the loss and of them, with two places behind them; None
        where it has to be gone through again, in smaller parts.

        Each rank goes by its own memory, unless weights are partitioned: there the others wait in a gather, and all of
        them have to start again.

        Raises:
            TooLarge: that.
        """
        batch = self.stream.batch(self.step).to(self.world.device)
        names: list[str] = []
        sums = torch.zeros(0)
        try:
            for ids in batch.split(self.micro_batch):
                share = self.share(ids, batch)
                with into_grad():
                    losses = forward(ids)
                # Not even a NaN may keep a rank from its backward pass: the others gather weights in theirs.
                self.engine.backward(losses.total * share)
                values = torch.stack([losses.total, *losses.terms.values()]).detach().double() * share
                if not names:
                    names, sums = list(losses.terms), values.new_zeros(len(values) + 2)
                sums[:-2] += values
        except (RuntimeError, MemoryError) as error:
            if self.micro_batch == 1 or not is_out_of_memory(error):
                raise
        else:
            return names, sums
        self.engine.discard()
        self.micro_batch = -(-min(self.micro_batch, len(batch)) // 2)
        if self.partitioned:
            remember(self.checkpoints.directory, self.micro_batch)
            raise TooLarge(
                f"rank {self.world.rank}: out of memory at step {self.step}: start the same command again, it goes on "
                f"from the newest checkpoint with train.micro_batch={self.micro_batch}"
            )
        log.warning("out of memory: step %d again, %d sequences at a time", self.step, self.micro_batch)
        return None

    def update(self, loss: float) -> dict[str, float]:
        """Apply the gradients unless the step is not finite; ten bad steps in a row end the run."""
        if math.isfinite(loss):
            result = self.engine.step(self.step)
            skipped, norm = result.skipped, result.grad_norm
        else:
            self.engine.discard()
            skipped, norm = True, float("nan")
        self.bad_in_a_row = self.bad_in_a_row + 1 if skipped else 0
        self.bad_total += skipped
        if skipped:
            log.warning("step %d skipped: loss %g, gradient norm %g (%d in a row)", self.step, loss, norm,
                        self.bad_in_a_row)  # fmt: skip
        if self.bad_in_a_row >= MAX_BAD_STEPS:
            path, _ = self.checkpoints.newest_valid()
            raise TrainingFailed(
                f"{self.bad_in_a_row} steps in a row had a NaN or infinite loss or gradient (last: step {self.step}); "
                f"the last good state is {path or 'the start of the run (no checkpoint yet)'}; start anew in another "
                f"run_dir {self.remedy}"
            )
        return {"grad_norm": norm, "skipped_steps": float(self.bad_total)}


class Masked(Trainer):
    """A stage on a masked student, whose LoRA learns and perhaps its gates.

    Args:
        parts: of `Trainer`, with an `Engine`.
        masks: gates, in training or fixed.
        teacher: who teaches.
        multipliers: the Lagrangian's, where there are any.
    """

    engine: Engine

    def __init__(self, *parts, masks: MaskSet, teacher: Teacher, multipliers: Multipliers | None = None):
        super().__init__(*parts)
        self.masks, self.teacher, self.multipliers = masks, teacher, multipliers

    def before_save(self) -> Facts:
        """Bring the shards of the optimizer's state to rank 0. Collective."""
        self.engine.collect()
        return {}

    def before_finish(self) -> None:
        """Nothing: rank 0 has all of it."""

    def save(self, directory: Path, counters: dict) -> None:
        """Write all that `load` needs, on rank 0."""
        save_state(directory, self.config, *self._state(), counters, self.checkpoints.newest())

    def load(self, directory: Path) -> dict[str, float]:
        """Restore in place what `save` wrote; returns the counters."""
        return load_state(directory, *self._state())

    def _state(self) -> tuple[MaskSet, Multipliers | None, Update, dict[str, torch.optim.Optimizer], Teacher]:
        return self.masks, self.multipliers, self.model.update, self.engine.optimizers, self.teacher
