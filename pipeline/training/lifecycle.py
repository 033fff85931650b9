"""What every long stage does around its loop: own its run directory, know when it is done."""

from __future__ import annotations

import logging
from pathlib import Path

from nuteprune.config import Config
from nuteprune.errors import MachineError, UserError
from nuteprune.runs.checkpoint import CheckpointError, verify
from nuteprune.runs.rundir import save_config
from nuteprune.training.resume import check_same_run

log = logging.getLogger(__name__)


def check_directory(config: Config, free: tuple[str, ...]) -> Path:
    """The run directory, made if need be, after a check that it is this run's; nothing in it is changed.

    Args:
        config: the run's settings.
        free: sections that may differ from those of an earlier start.

    Raises:
        UserError: none is set, it belongs to another configuration, or it cannot be written to.
    """
    if not config.run_dir:
        raise UserError("run_dir is empty: set it to the directory this run may write to")
    run_dir = Path(config.run_dir)
    check_same_run(run_dir, config, free)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"run_dir {run_dir} cannot be written to: {error.strerror}") from None
    return run_dir


def claim_directory(config: Config) -> None:
    """Make the run directory this run's, once its model and data are known to be good: its settings go there."""
    run_dir = Path(config.run_dir)
    try:
        save_config(run_dir / "config.yaml", config)
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
