"""Where students of a run are trained on, below its directory."""

from __future__ import annotations

import os
from pathlib import Path

from nuteprune.errors import MachineError, UserError

TUNED = "tuned"
"""Name of the student below the directory in which it was trained on."""
DISTILLED = "model"
"""Name of the model below the directory in which it was distilled."""
LEFT_OUT = "left-out.json"
"""Name of a file in a run's directory: of each stage that `nuteprune run` leaves out, why."""


def check_pruned(run_dir: str | Path) -> Path:
    """The directory of a run's finished student; raises `UserError` where there is none."""
    if not str(run_dir):
        raise UserError("run_dir is empty: set it to the directory of a finished prune run")
    pruned = Path(run_dir) / "pruned"
    if not pruned.is_dir():
        raise UserError(f"{run_dir} holds no finished prune run (no `pruned` directory): run `nuteprune prune` first")
    return pruned


def check_place(run_dir: Path) -> None:
    """Raise `UserError` where a run's directory is none and cannot be made."""
    there = next(place for place in (run_dir, *run_dir.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"run_dir {run_dir} is a file, or below one: choose another directory")
    if there != run_dir and not os.access(there, os.W_OK | os.X_OK):
        raise MachineError(f"run_dir {run_dir} cannot be made: {there} cannot be written to")


def finetune_directory(run_dir: Path, target: float, sparsity: float) -> Path:
    """Where a student is fine-tuned: its checkpoints, logs and result. 0 or the run's target: the final student."""
    return run_dir / ("finetune" if sparsity in (0, target) else f"finetune-{sparsity:g}")


def recover_directory(run_dir: Path, target: float, sparsity: float) -> Path:
    """Where a rung is recovered: its checkpoints, logs and result. 0: that at the run's target."""
    return run_dir / f"recover-{sparsity or target:g}"


def instruct_directory(run_dir: Path) -> Path:
    """Where the distilled model is trained on records: its checkpoints, logs and result."""
    return run_dir / "instruct"


def distill_directory(run_dir: Path) -> Path:
    """Where all weights of the exported model are trained: its checkpoints, logs and result."""
    return run_dir / "distill"
