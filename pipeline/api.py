"""The calls of the Python API, which the command line uses too.

Each takes the settings as a YAML file, the directory of a run, a nested dict, or a `Config`, and overrides as on the
command line. A user's mistake raises `nuteprune.errors.UserError` with one line that says how to mend it.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuteprune.config import Config, load_config

if TYPE_CHECKING:
    from nuteprune.exporting.masked import MaskedModel

Settings = Config | Mapping | str | Path | None


def prepare(settings: Settings = None, overrides: Sequence[str] = ()) -> Path:
    """Fetch the model, tokenise and pack the text once, for `prune` and `export` of the same `run_dir`; no GPU needed.

    Arguments and errors as of `prune`; returns the directory of the packed text.
    """
    return _module("stages.prepare").run(load_config(settings, overrides))


def prune(settings: Settings = None, overrides: Sequence[str] = ()) -> Path:
    """Learn gates and LoRA on the base model `model.path`, into `run_dir`; goes on where an earlier start stopped.

    Args:
        settings: YAML file, run directory, nested dict or `Config`.
        overrides: strings `key.sub=value`, which win.

    Returns:
        The directory of the finished student.

    Raises:
        UserError: a mistake in the settings, the model, the data or the run directory.
        TrainingFailed: too many steps in a row were not finite.
        Preempted: SIGTERM, SIGUSR1 or Ctrl-C came; the state is saved. No `Exception`, as `KeyboardInterrupt` is none.
    """
    return _module("stages.prune").run(load_config(settings, overrides))


def recover(settings: Settings, overrides: Sequence[str] = ()) -> list[Path]:
    """Train the snapshots of a finished run at `recover.ladder` on, their gates fixed; `export` takes them by itself.

    Arguments and errors as of `prune`; returns the directories of the recovered rungs.
    """
    return _module("stages.recover").run(load_config(settings, overrides))


def finetune(settings: Settings, overrides: Sequence[str] = ()) -> Path:
    """Fine-tune the LoRA of a finished run's student on the instruction records `finetune.data`.

    Arguments and errors as of `prune`; returns the directory of the fine-tuned student.
    """
    return _module("stages.finetune").run(load_config(settings, overrides))


def distill(settings: Settings, overrides: Sequence[str] = ()) -> Path:
    """Train the weights of a finished run's exported model, taught by the intact one; `evaluate` takes it by itself.

    Arguments and errors as of `prune`; returns the directory of the model.
    """
    return _module("stages.distill").run(load_config(settings, overrides))


def export(settings: Settings, overrides: Sequence[str] = ()) -> Path:
    """Write a finished run's student (fine-tuned where it was) as a small Hugging Face model, or a ladder of them.

    Arguments as of `prune`.

    Returns:
        The directory of the model, or with `export.ladder` that of the rungs and their comparison.

    Raises:
        UserError: as `prune`; or a rung that the run never reached.
        ExportError: the small model does not compute what the masked model computes.
    """
    return _module("stages.export").run(load_config(settings, overrides))


def evaluate(settings: Settings, overrides: Sequence[str] = ()) -> dict:
    """Compare the base model, a run's export and what `distill` made of that, or `evaluate.models`.

    Returns the report that is written. Arguments and errors as of `prune`.
    """
    return _module("stages.evaluate").run(load_config(settings, overrides))


def load_masked(settings: Settings, overrides: Sequence[str] = ()) -> MaskedModel:
    """The student of a finished run as a masked model: base weights, gates and LoRA, nothing folded or deleted.

    Arguments as of `prune`; `export.sparsity`, `export.source` and `export.shape` choose the student.
    """
    return _module("exporting.masked").load(load_config(settings, overrides))


def _module(name: str) -> Any:
    """A module with the libraries that it alone needs, imported when it is first used.

    They make a million objects, which stay: to search those for garbage as they come is a fifth of a start.
    """
    wanted = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(f"nuteprune.{name}")
    finally:
        if wanted:
            gc.enable()
