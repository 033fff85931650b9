"""The training loop of every stage: resume, steps over micro-batches, bad steps, checkpoints, signals, progress.

A stage is a `Trainer`: it says what one step computes and what its state and its result on disk are.
"""

from __future__ import annotations

import hashlib
import logging
import math
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import cached_file

from nuteprune.config import Config, ConfigError, flatten, to_dict
from nuteprune.data.text import BatchStream
from nuteprune.kernels.api import into_grad
from nuteprune.masks.schedule import Schedule
from nuteprune.model.pairing import Losses, PairedModel
from nuteprune.parallel.device import named
from nuteprune.parallel.distributed import World, connected, discover
from nuteprune.runs.checkpoint import Checkpoints, atomic_directory, sha256
from nuteprune.runs.fingerprint import fingerprint
from nuteprune.runs.rundir import DAMAGED, reason
from nuteprune.training.determinism import deterministic
from nuteprune.training.engine import Engine
from nuteprune.training.inputs import fetch_once
from nuteprune.training.lifecycle import check_directory, claim_directory, is_finished
from nuteprune.training.memory import is_out_of_memory
from nuteprune.training.resume import check_fits
from nuteprune.training.signals import Preempted, Stop, stop_signals
from nuteprune.training.tracking import Tracker, check_reporters, progress_bar

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
        schedule: the run's steps.
    """

    stage: ClassVar[str]
    """Prefix of the scalars' names."""
    output: ClassVar[str]
    """Name of the finished result below the run directory."""
    outputs: ClassVar[tuple[str, ...]]
    """Everything below the run directory that a run started anew deletes."""
    free: ClassVar[tuple[str, ...]]
    """Sections of the configuration that may change between two starts of one run."""

    def __init__(
        self, config: Config, world: World, model: PairedModel, engine: Engine, stream: BatchStream, schedule: Schedule
    ):
        self.config, self.world, self.model, self.engine = config, world, model, engine
        self.stream, self.schedule, self.total = stream, schedule, schedule.total
        self.checkpoints = Checkpoints(Path(config.run_dir) / "checkpoints", config.checkpoint.keep)
        self.step = self.bad_in_a_row = self.bad_total = 0
        self.micro_batch = config.train.micro_batch or stream.local_size
        """Sequences of a forward pass."""
        self.stop, self.stopping = Stop(), False

    @classmethod
    @abstractmethod
    def build(cls, config: Config, world: World) -> Trainer:
        """Load the model and data and put a run together, at step 0."""

    @abstractmethod
    def start(self) -> None:
        """What is done before the steps: in a new run, and what no checkpoint holds in one that goes on."""

    @abstractmethod
    def train_step(self) -> dict[str, float]:
        """Step `self.step`: forward, backward, update; returns the scalars to log."""

    @abstractmethod
    def save(self, directory: Path, counters: dict) -> None:
        """Write all that `load` needs, on rank 0."""

    @abstractmethod
    def load(self, directory: Path) -> dict[str, float]:
        """Restore in place what `save` wrote; returns the counters."""

    @abstractmethod
    def finish(self) -> Path:
        """Write the result after the last step, on rank 0; returns its directory."""

    @cached_property
    def inputs(self) -> dict[str, str | None]:
        """Fingerprints of what the state is worth nothing without: the base model and the text or records."""
        base = self.config.model.path
        data = hashlib.sha256(self.stream.blocks.contiguous().numpy()).hexdigest()
        sizes = sha256(Path(cached_file(base, "config.json")))
        return {"model.path": fingerprint(base), "config.json of model.path": sizes, "data.source": data}

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
        """Backward of this step's micro-batches; returns the loss terms, averaged over the global batch.

        With them travels whether any rank was asked to stop, so that all of them stop at the same step.

        Args:
            forward: losses of a micro-batch [b, T].
        """
        sums = None
        while sums is None:
            sums = self._backward(forward)
        sums[4] = bool(self.stop.received)
        loss, layer, kl, entropy, stopping = self.world.mean(sums).tolist()
        self.stopping = stopping > 0
        return {"loss": loss, "layer_loss": layer, "kl_loss": kl, "label_loss": entropy}

    def _backward(self, forward: Callable[[Tensor], Losses]) -> Tensor | None:
        """Sums of the loss terms over the rank's batch; None where it has to be gone through again, in smaller parts.

        Each rank goes by its own memory. Not where weights are partitioned: there the others would wait in a gather.
        """
        batch = self.stream.batch(self.step).to(self.world.device)
        sums = torch.zeros(5, dtype=torch.float64, device=self.world.device)
        try:
            for ids in batch.split(self.micro_batch):
                share = self.share(ids, batch)
                with into_grad():
                    losses = forward(ids)
                # Not even a NaN may keep a rank from its backward pass: the others gather weights in theirs.
                self.engine.backward(losses.total * share)
                sums[:4] += torch.stack(losses).detach().double() * share
        except (RuntimeError, MemoryError) as error:
            if self.micro_batch == 1 or self.model.partitioning or not is_out_of_memory(error):
                raise
        else:
            return sums
        # Behind the `except`, whose error refers to what fills the memory.
        self.engine.discard()
        torch.cuda.empty_cache()
        self.micro_batch = -(-min(self.micro_batch, len(batch)) // 2)
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
        Preempted: SIGTERM, SIGUSR1 or SIGINT came to any rank; the state is saved.
        RankLost: another rank died.
    """
    world = discover()
    ranks = connected(world, config.train.rank_timeout) if world.size > 1 or config.deepspeed else nullcontext()
    with stop_signals() as stop, ranks, deterministic(config.train.deterministic):
        return _train(config, stage, world, stop)


def _train(config: Config, stage: type[Trainer], world: World, stop: Stop) -> Path:
    check_alike(config, world)
    output = Path(config.run_dir) / stage.output
    finished = False
    with world.together():
        if world.is_main:
            check_reporters(config.tracking)
            check_directory(config, stage.free)
            finished = config.checkpoint.resume == "auto" and is_finished(output)
    if world.from_main(finished):
        log.info("already finished: %s", output)
        return output
    fetch_once(config.model.path, world)
    torch.manual_seed(config.seed)
    trainer = stage.build(config, world)
    log.info("computing on %s%s", named(world.device), f", rank 0 of {world.size}" if world.size > 1 else "")
    with world.together():
        if world.is_main:
            claim_directory(config, stage.outputs)
    resume(trainer)
    trainer.stop, stop.polled = stop, True
    with world.together():
        tracker = Tracker(config, trainer.stage, trainer.total, trainer.step, world.is_main)
    with tracker:
        trainer.start()
        run_steps(trainer, tracker)
    with world.together():
        if world.is_main:
            trainer.finish()
    return output


def run_steps(trainer: Trainer, tracker: Tracker) -> None:
    """The steps that are left, with a checkpoint now and then and before the run leaves on a signal."""
    every = trainer.config.checkpoint.every
    with trainer.progress_bar(trainer.stage, "step", trainer.total, trainer.step) as bar:
        while trainer.step < trainer.total:
            began = time.perf_counter()
            metrics = trainer.train_step()
            report(trainer, tracker, metrics, time.perf_counter() - began)
            bar.set_postfix(trainer.progress(metrics), refresh=False)
            bar.update()
            trainer.step += 1
            if trainer.stopping or (every and trainer.step % every == 0 and trainer.step < trainer.total):
                save_checkpoint(trainer)
            if trainer.stopping:
                raise Preempted(
                    f"{trainer.stop.name} at step {trainer.step} of {trainer.total}: saved; start again with "
                    "checkpoint.resume=auto (the default) to go on"
                )


def check_alike(config: Config, world: World) -> None:
    """Raise `ConfigError` unless there are as many ranks as wanted, with the same settings on the same versions.

    A rank that differs would compute something else, or wait in another collective for ever.
    """
    versions = {f"version of {name}": metadata.version(name) for name in ("torch", "transformers", "deepspeed")}
    # First: rank 0 keeps the store that others may still be connecting through, and must not end before they have.
    first, *others = world.gather(flatten(to_dict(config)) | versions)
    if config.train.ranks not in (0, world.size):
        raise ConfigError(
            f"train.ranks is {config.train.ranks}, but {world.size} started: look at the launcher's arguments and hosts"
        )
    for rank, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise ConfigError(
                    f"rank {rank} has {key}={other.get(key)!r}, rank 0 {first.get(key)!r}: start all ranks alike"
                )


def resume(trainer: Trainer) -> None:
    """Restore the newest checkpoint that verifies, if there is one; rank 0 chooses it."""
    world = trainer.world
    if trainer.config.checkpoint.resume == "never":
        return
    path = None
    with world.together():
        if world.is_main:
            path = choose_checkpoint(trainer.checkpoints)
    path = world.from_main(path)
    if path is None:
        return
    with world.together():
        if not path.is_dir():
            raise ConfigError(f"{path} is not seen here: run_dir must be in a file system that all ranks share")
        try:
            if world.is_main:
                check_fits(path, trainer.config, trainer.free, trainer.inputs)
            counters, scale = trainer.load(path), trainer.engine.scale
            trainer.step, trainer.bad_total = int(counters["step"]), int(counters["bad_total"])
            scale.value, scale.good_steps = counters["loss_scale"], int(counters["good_steps"])
        except ConfigError:
            raise
        except (*DAMAGED, RuntimeError) as error:  # whole, but of something else
            raise ConfigError(f"{path} does not fit this run ({reason(error)}): remove it and start again") from error
    log.info("resumed at step %d from %s", trainer.step, path)


def choose_checkpoint(checkpoints: Checkpoints) -> Path | None:
    """The newest checkpoint that verifies; newer ones are told of and deleted."""
    path, skipped = checkpoints.newest_valid()
    for why in skipped:
        log.warning("checkpoint skipped: %s", why)
    if skipped and path is None:
        log.warning("no checkpoint is whole: starting anew")
    checkpoints.drop_newer_than(path)
    return path


def save_checkpoint(trainer: Trainer) -> None:
    """Write the state after the current step on rank 0, then drop checkpoints beyond `checkpoint.keep`."""
    scale = trainer.engine.scale
    counters: dict[str, Any] = {"step": trainer.step, "bad_total": trainer.bad_total, "loss_scale": scale.value,
                                "good_steps": scale.good_steps}  # fmt: skip
    trainer.engine.collect()
    with trainer.world.together():
        if trainer.world.is_main:
            counters |= {"inputs": trainer.inputs}
            lender = trainer.checkpoints.newest()
            with atomic_directory(trainer.checkpoints.path(trainer.step), lender) as temporary:
                trainer.save(temporary, counters)
            trainer.checkpoints.prune()


def report(trainer: Trainer, tracker: Tracker, metrics: dict[str, float], seconds: float) -> None:
    """Log a step's scalars and pictures."""
    config, step = trainer.config, trainer.step
    metrics |= {
        "step_s": seconds,
        "tokens_per_s": config.train.batch_size * config.data.seq_len / seconds,
        "peak_memory_gb": peak_memory_gb(trainer.world.device),
    }
    tracker.log(step, metrics)
    if step % config.tracking.image_every == 0 or step == trainer.total - 1:
        tracker.picture(step, trainer.pictures())


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB: of the accelerator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
