"""The training loop of every stage: resume, steps, checkpoints, signals, progress.

A stage is a `Trainer`: it says what one step computes and what its state and its result on disk are.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from nuteprune.config import Config, flatten, to_dict
from nuteprune.errors import MachineError, UserError, first_line
from nuteprune.model.loading import check_trained_dtype
from nuteprune.parallel.device import named
from nuteprune.parallel.distributed import World, connected, discover
from nuteprune.parallel.host import multiplies_bfloat16
from nuteprune.runs.checkpoint import CheckpointError, Checkpoints, atomic_directory, verify
from nuteprune.runs.directories import check_place
from nuteprune.runs.lock import alone
from nuteprune.runs.rundir import save_config
from nuteprune.training.determinism import deterministic
from nuteprune.training.inputs import fetch_once
from nuteprune.training.memory import remembered
from nuteprune.training.resume import check_fits, check_same_run
from nuteprune.training.signals import Preempted, Stop, stop_signals
from nuteprune.training.tracking import Tracker, check_reporters
from nuteprune.training.trainer import Trainer

log = logging.getLogger(__name__)

PICTURE_EVERY = 50
"""Steps between two pictures of the kept units."""


def train(config: Config, stage: type[Trainer], *known: Any) -> Path:
    """Run a stage to its end; returns the directory of its result. `known` goes to its `build`.

    Started again on the same run directory it goes on from the newest checkpoint that verifies, or returns at once if
    the result is finished.

    Raises:
        UserError: a mistake in the configuration, the model, the data or the run directory; or another process is at
            work in that.
        TrainingFailed: too many steps in a row were not finite.
        Preempted: SIGTERM, SIGUSR1 or SIGINT came to any rank; the state is saved.
        RankLost: another rank died.
        TooLarge: this rank's memory was too small for a micro-batch on partitioned weights.
    """
    world = discover()
    ranks = connected(world, config.train.rank_timeout) if world.size > 1 or config.deepspeed else nullcontext()
    with stop_signals() as stop, ranks, deterministic(config.train.deterministic), ExitStack() as held:
        return _train(config, stage, known, world, stop, held)


def _train(config: Config, stage: type[Trainer], known: tuple, world: World, stop: Stop, held: ExitStack) -> Path:
    check_alike(config, world)
    output = Path(config.run_dir) / stage.output
    with world.together():
        if world.is_main:
            check_reporters(config.tracking)
            check_directory(config, stage.free)
    if world.from_main(world.unhurried(lambda: world.is_main and is_finished(output))):
        log.info("already finished: %s", output)
        return output
    fetch_once(config.model.path, world)
    torch.manual_seed(config.seed)
    trainer = stage.build(config, world, *known)
    log.info("computing on %s%s", named(world.device), f", rank 0 of {world.size}" if world.size > 1 else "")
    if world.device.type == "cpu" and config.model.dtype == "bfloat16" and multiplies_bfloat16() is False:
        log.warning("this processor is many times as slow in bfloat16: set model.dtype=float32")
    with world.together():
        if world.is_main:
            held.enter_context(claim_directory(config, stage.stage))
    trainer.micro_batch = world.from_main(remembered(trainer.checkpoints.directory, trainer.micro_batch))
    resume(trainer, planned=not config.train.micro_batch)
    trainer.stop, stop.polled = stop, True
    with world.together():
        tracker = Tracker(config, trainer.stage, trainer.total, trainer.step, world.is_main)
    with tracker:
        trainer.start()
        run_steps(trainer, tracker)
    trainer.before_finish()
    world.unhurried(lambda: trainer.finish() if world.is_main else None)
    stop.polled = False
    return output


def check_directory(config: Config, free: tuple[str, ...]) -> None:
    """Check that the run directory is this run's, or that it can be made; nothing is made or changed.

    Args:
        config: the run's settings.
        free: sections that may differ from those of an earlier start.

    Raises:
        UserError: none is set, it lies among the text, it belongs to another configuration, or it cannot be written to;
            a type that nothing trains in.
    """
    check_trained_dtype(config.model.dtype)
    if not config.run_dir:
        raise UserError("run_dir is empty: set it to the directory this run may write to")
    run_dir, source = Path(config.run_dir), Path(config.data.source)
    check_same_run(run_dir, config, free)
    begun = (run_dir / "config.yaml").is_file()
    if config.data.source and not begun and source.is_dir() and run_dir.resolve().is_relative_to(source.resolve()):
        raise UserError(f"run_dir {run_dir} is below {source}, all of which is read as text: choose another directory")
    check_place(run_dir)


def make_directory(config: Config) -> None:
    """Make the run directory if need be; raises as `check_directory`."""
    run_dir = Path(config.run_dir)
    with _writing_to(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)


@contextmanager
def claim_directory(config: Config, stage: str) -> Iterator[None]:
    """A block to which the run directory belongs, once model and data are known to be good: its settings go there."""
    make_directory(config)
    run_dir = Path(config.run_dir)
    with alone(run_dir, stage):
        with _writing_to(run_dir):
            save_config(run_dir / "config.yaml", config)
        yield


def release_directory(config: Config) -> None:
    """Take back what `claim_directory` did: a start that is refused before it has saved anything binds no other one."""
    (Path(config.run_dir) / "config.yaml").unlink(missing_ok=True)


@contextmanager
def _writing_to(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"run_dir {run_dir} is a file, or below one: choose another directory") from None
    except OSError as error:
        raise MachineError(f"run_dir {run_dir} cannot be written to: {error.strerror}") from None


def is_finished(output: Path) -> bool:
    """Whether a stage's output directory is there and whole."""
    if not output.is_dir():
        return False
    try:
        verify(output)
    except CheckpointError as error:
        log.warning("%s is damaged and will be made again: %s", output, error)
        return False
    return True


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
            due = trainer.step % every == 0 if every else trainer.overdue
            if trainer.stopping or (due and trainer.step < trainer.total):
                save_checkpoint(trainer)
            if trainer.stopping:
                raise Preempted(
                    f"{trainer.stop.name} at step {trainer.step} of {trainer.total}: saved; start again to go on"
                )


def check_alike(config: Config, world: World) -> None:
    """Raise `UserError` unless all ranks have the same settings and versions.

    A rank that differs would compute something else, or wait in another collective for ever.
    """
    versions = {f"version of {name}": metadata.version(name) for name in ("torch", "transformers", "deepspeed")}
    # First: rank 0 keeps the store that others may still be connecting through, and must not end before they have.
    first, *others = world.gather(flatten(to_dict(config)) | versions)
    for rank, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise UserError(
                    f"rank {rank} has {key}={other.get(key)!r}, rank 0 {first.get(key)!r}: start all ranks alike"
                )


def resume(trainer: Trainer, planned: bool) -> None:
    """Restore the newest checkpoint that verifies, if there is one; rank 0 chooses it.

    Args:
        trainer: at step 0.
        planned: whether its micro-batch is not the user's: then it is at most the checkpoint's, for the same bits.
    """
    world = trainer.world
    path = world.unhurried(lambda: choose_checkpoint(trainer.checkpoints) if world.is_main else None)
    path = world.from_main(path)
    if path is None:
        return
    with world.together():
        if not path.is_dir():
            raise UserError(f"{path} is not seen here: run_dir must be in a file system that all ranks share")
        try:
            if world.is_main:
                check_fits(path, trainer.config, trainer.free, trainer.inputs)
            counters = trainer.load(path)
            trainer.step, trainer.bad_total = int(counters["step"]), int(counters["bad_total"])
            trainer.bad_in_a_row = int(counters["bad_in_a_row"])
            if planned and counters.get("ranks") == world.size:
                trainer.micro_batch = min(trainer.micro_batch, int(counters["micro_batch"]))
        except UserError:
            raise
        # Whole, but of something else.
        except (CheckpointError, SafetensorError, OSError, LookupError, RuntimeError) as error:
            raise UserError(f"{path} does not fit this run ({first_line(error)}): remove it and start again") from error
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
    counters: dict[str, Any] = {"step": trainer.step, "bad_total": trainer.bad_total,
                                "bad_in_a_row": trainer.bad_in_a_row, "micro_batch": trainer.micro_batch,
                                "ranks": trainer.world.size}  # fmt: skip
    began = time.monotonic()
    written = trainer.before_save()
    with trainer.world.together():
        if trainer.world.is_main:
            counters |= {"inputs": trainer.inputs}
            lender = trainer.checkpoints.newest()
            with atomic_directory(trainer.checkpoints.path(trainer.step), lender, written) as temporary:
                trainer.save(temporary, counters)
            trainer.checkpoints.prune()
    trainer.saved = time.monotonic()
    trainer.saving_seconds = trainer.saved - began


def report(trainer: Trainer, tracker: Tracker, metrics: dict[str, float], seconds: float) -> None:
    """Log a step's scalars and pictures."""
    config, step = trainer.config, trainer.step
    metrics |= {
        "step_s": seconds,
        "tokens_per_s": config.train.batch_size * config.data.seq_len / seconds,
        "peak_memory_gb": peak_memory_gb(trainer.world.device),
    }
    tracker.log(step, metrics)
    if step % PICTURE_EVERY == 0 or step == trainer.total - 1:
        tracker.picture(step, trainer.pictures())


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB: of the accelerator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
