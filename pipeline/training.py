"""The training loop of every stage: resume, steps over micro-batches, bad steps, checkpoints, signals, progress.

A stage is a `Trainer`: it says what one step computes and what its state and its result on disk are.
"""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
import yaml
from torch import Tensor

from pipeline.checkpoint import Checkpoints, atomic_directory
from pipeline.config import Config, to_dict
from pipeline.data import BatchStream
from pipeline.distributed import World, discover
from pipeline.engine import Engine
from pipeline.lifecycle import Preempted, Stop, check_directory, claim_directory, is_finished, stop_signals
from pipeline.pairing import Losses, PairedModel
from pipeline.tracking import Tracker

log = logging.getLogger(__name__)


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
        total: steps of the run.
    """

    stage: ClassVar[str]
    """Prefix of the scalars' names."""
    output: ClassVar[str]
    """Name of the finished result below the run directory."""
    outputs: ClassVar[tuple[str, ...]]
    """Everything below the run directory that a run started anew deletes."""

    def __init__(
        self, config: Config, world: World, model: PairedModel, engine: Engine, stream: BatchStream, total: int
    ):
        self.config, self.world, self.model, self.engine = config, world, model, engine
        self.stream, self.total = stream, total
        self.checkpoints = Checkpoints(Path(config.run_dir) / "checkpoints", config.checkpoint.keep)
        self.step = self.bad_in_a_row = self.bad_total = 0

    @classmethod
    @abstractmethod
    def build(cls, config: Config, world: World) -> Trainer:
        """Load the model and data and put a run together, at step 0."""

    @abstractmethod
    def start(self, stop: Stop) -> None:
        """What a new run does before its first step."""

    @abstractmethod
    def train_step(self) -> dict[str, float]:
        """Step `self.step`: forward, backward, update; returns the scalars to log."""

    @abstractmethod
    def save(self, directory: Path, counters: dict[str, int], earlier: Path | None) -> None:
        """Write all that `load` needs; files that never change may be linked from the checkpoint `earlier`."""

    @abstractmethod
    def load(self, directory: Path) -> dict[str, int]:
        """Restore in place what `save` wrote; returns the counters."""

    @abstractmethod
    def finish(self, tracker: Tracker) -> Path:
        """Write the result after the last step; returns its directory."""

    def progress(self, metrics: dict[str, float]) -> dict[str, str]:
        """What stands behind the progress bar."""
        return {"loss": f"{metrics['loss']:.3f}"}

    def pictures(self) -> dict[str, Tensor]:
        """Pictures of units [L, U] in 0..1 for TensorBoard, by name."""
        return {}

    def accumulate(self, forward: Callable[[Tensor, int, float], Losses]) -> dict[str, float]:
        """Backward of this step's micro-batches; returns the mean loss terms.

        Args:
            forward: losses of a micro-batch [b, T], given its number and its share of the rank's batch.
        """
        batch = self.stream.batch(self.step).to(self.world.device)
        sums = dict.fromkeys(("loss", "layer_loss", "output_loss"), 0.0)
        for number, ids in enumerate(batch.split(self.config.train.micro_batch or len(batch))):
            share = len(ids) / len(batch)
            losses = forward(ids, number, share)
            total = losses.total * share
            if total.isfinite():
                self.engine.backward(total)
            sums["loss"] += total.item()
            sums["layer_loss"] += losses.layer.item() * share
            sums["output_loss"] += losses.output.item() * share
        return sums

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
        if self.bad_in_a_row >= self.config.train.max_bad_steps:
            path, _ = self.checkpoints.newest_valid()
            raise TrainingFailed(
                f"{self.bad_in_a_row} steps in a row had a NaN or infinite loss or gradient (last: step {self.step}); "
                f"the last good state is {path or 'the start of the run (no checkpoint yet)'}; start anew in another "
                "run_dir with a lower train.lora_lr, or with model.dtype=float32"
            )
        return {"grad_norm": norm, "skipped_steps": float(self.bad_total)}


def train(config: Config, stage: type[Trainer]) -> Path:
    """Run a stage to its end; returns the directory of its result.

    Started again on the same run directory it goes on from the newest checkpoint that verifies, or returns at once if
    the result is finished.

    Raises:
        ConfigError: a mistake in the configuration, the model, the data or the run directory.
        TrainingFailed: too many steps in a row were not finite.
        Preempted: SIGTERM or SIGUSR1 came; the state is saved.
    """
    run_dir = check_directory(config)
    if config.checkpoint.resume == "auto" and is_finished(run_dir / stage.output):
        log.info("already finished: %s", run_dir / stage.output)
        return run_dir / stage.output
    torch.manual_seed(config.seed)
    trainer = stage.build(config, discover())
    claim_directory(config, stage.outputs)
    resume(trainer)
    with _tracker(trainer) as tracker, stop_signals() as stop:
        if trainer.step == 0:
            trainer.start(stop)
        while trainer.step < trainer.total:
            began = time.perf_counter()
            metrics = trainer.train_step()
            report(trainer, tracker, metrics, time.perf_counter() - began)
            trainer.step += 1
            every = config.checkpoint.every
            if stop.received or (every and trainer.step % every == 0 and trainer.step < trainer.total):
                save_checkpoint(trainer)
            if stop.received:
                raise Preempted(
                    f"{stop.received} at step {trainer.step} of {trainer.total}: saved; start again with "
                    "checkpoint.resume=auto (the default) to go on"
                )
        return trainer.finish(tracker)


def resume(trainer: Trainer) -> None:
    """Restore the newest checkpoint that verifies, if there is one."""
    if trainer.config.checkpoint.resume == "never":
        return
    path, skipped = trainer.checkpoints.newest_valid()
    trainer.checkpoints.drop_newer_than(path)
    for reason in skipped:
        log.warning("checkpoint skipped: %s", reason)
    if path is None:
        if skipped:
            log.warning("no checkpoint is whole: starting anew")
        return
    counters = trainer.load(path)
    trainer.step, trainer.bad_total = counters["step"], counters["bad_total"]
    log.info("resumed at step %d from %s", trainer.step, path)


def save_checkpoint(trainer: Trainer) -> None:
    """Write the state after the current step, then drop checkpoints beyond `checkpoint.keep`."""
    counters = {"step": trainer.step, "bad_total": trainer.bad_total}
    earlier = next(iter(trainer.checkpoints.newest_first()), None)
    with atomic_directory(trainer.checkpoints.path(trainer.step)) as temporary:
        trainer.save(temporary, counters, earlier)
    trainer.checkpoints.prune()


def report(trainer: Trainer, tracker: Tracker, metrics: dict[str, float], seconds: float) -> None:
    """Log a step's scalars, pictures and progress."""
    config, step = trainer.config, trainer.step
    metrics |= {
        "step_s": seconds,
        "tokens_per_s": config.train.batch_size * config.data.seq_len / seconds,
        "peak_memory_gb": peak_memory_gb(trainer.world.device),
    }
    tracker.log(step, metrics)
    if step % config.tracking.image_every == 0 or step == trainer.total - 1:
        tracker.images(step, trainer.pictures())
    tracker.progress(step, trainer.progress(metrics))


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB: of the accelerator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def _tracker(trainer: Trainer) -> Tracker:
    config = trainer.config
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    return Tracker(
        config.run_dir, config.tracking, trainer.total, trainer.step, trainer.world.is_main, trainer.stage, text
    )
