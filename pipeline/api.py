"""The calls of the Python API, which do what the commands of their names do.

Each takes the settings as a YAML file, the directory of a run, a nested dict, or a `Config`, and overrides as on the
command line. A user's mistake raises `nuteprune.errors.UserError` with one line that says how to mend it. Environment,
logging, warnings, signal handlers, threads and random generators are behind each call what they were before it.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuteprune.config import Config, deepspeed_path, given_keys, load_config
from nuteprune.data.text import check_records, check_source
from nuteprune.errors import UserError
from nuteprune.flags import parser
from nuteprune.runs.directories import check_place, check_pruned
from nuteprune.runs.lock import check_free
from nuteprune.runs.log import hush

if TYPE_CHECKING:
    from nuteprune.exporting.masked import MaskedModel

Settings = Config | Mapping | str | Path | None
PLACES = {"run": ("chain", "run"), "load_masked": ("exporting.masked", "load")}
"""Module and function of the calls that are no stage."""


class Report(dict):
    """The report of `evaluate`; shown as its table."""

    def __repr__(self) -> str:
        return module("evaluation.report").table(self)


def run(settings: Settings = None, overrides: Sequence[str] = ()) -> Report:
    """All stages one after the other, with settings chosen for this machine; goes on where it stopped.

    Arguments and errors as of `prune`; returns the report of the last stage, whose last model is the small one.
    """
    return Report(_call("run", settings, overrides, given_keys(settings, overrides))[1])


def plan(settings: Settings = None, overrides: Sequence[str] = (), **flags: Any) -> dict:
    """Memory, traffic and time of a run on a cluster, from the model's config.json alone.

    Args:
        settings, overrides: as of `prune`.
        flags: those of `nuteprune plan`, such as `gpu="h100"`, with _ for -.

    Returns:
        The plan as `nuteprune plan --json` prints it.
    """
    args = parser().parse_args(["plan", "--json"])
    if unknown := flags.keys() - vars(args).keys():
        raise UserError(f"plan has no flag {min(unknown)}: `nuteprune plan --help` lists them")
    vars(args).update(flags, config=settings if isinstance(settings, str | Path) else None)
    return json.loads(_call("plan", settings, overrides, args, given_keys(settings, overrides))[0])


def trim(settings: Settings, overrides: Sequence[str] = (), *, out: str | Path, tokens: int = 0) -> Path:
    """Copy the model `model.path` with only those tokens in its vocabulary that the text `data.source` uses.

    Args:
        settings, overrides: as of `prune`.
        out: directory of the result, which is returned.
        tokens: at most so many, the most frequent ones; 0: all that the text has.
    """
    _call("trim", settings, overrides, str(out), tokens)
    return Path(out)


def prepare(settings: Settings = None, overrides: Sequence[str] = ()) -> Path:
    """Fetch the model, tokenise and pack the text once, for `prune` and `export` of the same `run_dir`; no GPU needed.

    Arguments and errors as of `prune`; returns the directory of the packed text.
    """
    return _call("prepare", settings, overrides)


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
    return _call("prune", settings, overrides)


def recover(settings: Settings, overrides: Sequence[str] = ()) -> list[Path]:
    """Train the snapshots of a finished run at `recover.ladder` on, their gates fixed; `export` takes them by itself.

    Arguments and errors as of `prune`; returns the directories of the recovered rungs.
    """
    return _call("recover", settings, overrides)


def finetune(settings: Settings, overrides: Sequence[str] = ()) -> Path:
    """Fine-tune a run's distilled model, or where there is none its student's LoRA, on the records `finetune.data`.

    Arguments and errors as of `prune`; returns the directory of the result.
    """
    return _call("finetune", settings, overrides)


def distill(settings: Settings, overrides: Sequence[str] = ()) -> Path:
    """Train the weights of a finished run's exported model, taught by the intact one; `evaluate` takes it by itself.

    Arguments and errors as of `prune`; returns the directory of the model.
    """
    return _call("distill", settings, overrides)


def export(settings: Settings, overrides: Sequence[str] = ()) -> Path:
    """Write a finished run's student (fine-tuned where it was) as a small Hugging Face model, or a ladder of them.

    Arguments as of `prune`.

    Returns:
        The directory of the model, or with `export.ladder` that of the rungs and their comparison.

    Raises:
        UserError: as `prune`; or a rung that the run never reached.
        ExportError: the small model does not compute what the masked model computes.
    """
    return _call("export", settings, overrides)


def evaluate(settings: Settings, overrides: Sequence[str] = ()) -> Report:
    """Compare the base model, a run's export and what `distill` made of that, or `evaluate.models`.

    Returns the report that is written. Arguments and errors as of `prune`.
    """
    return Report(_call("evaluate", settings, overrides))


def load_masked(settings: Settings, overrides: Sequence[str] = ()) -> MaskedModel:
    """The student of a finished run as a masked model: base weights, gates and LoRA, nothing folded or deleted.

    Arguments as of `prune`; `export.sparsity`, `export.source` and `export.shape` choose the student.
    """
    return _call("load_masked", settings, overrides)


def _call(name: str, settings: Settings, overrides: Sequence[str], *more: Any) -> Any:
    """What the function behind a call returns for these settings and further arguments."""
    config = load_config(settings, overrides)
    check_at_once(name, config)
    place, function = PLACES.get(name, (f"stages.{name}", "run"))
    with _as_it_was():
        return getattr(module(place), function)(config, *more)


def check_at_once(stage: str, config: Config) -> None:
    """Raise `UserError` for what can be known without torch, whose import takes seconds.

    Not in one of several ranks, which may differ in what they see: they find it later, together.
    """
    if several_ranks():
        return
    from nuteprune.model.hub import check_model, check_tokenizer  # a tenth of a second

    run_dir = Path(config.run_dir)
    for name in (config.deepspeed, config.distill.deepspeed):
        if name:
            deepspeed_path(name)
    if stage in ("prepare", "prune", "run", "trim"):
        if config.run_dir:
            check_place(run_dir)
            check_free(run_dir, stage)
        elif stage in ("prepare", "prune"):
            raise UserError("run_dir is empty: set it to the directory this run may write to")
        if stage == "run":
            check_run(config)
        check_model(config.model.path)
        check_tokenizer(config.model.path)
        if not config.run_dir or not (run_dir / "prepared").is_dir():  # the text may have gone since
            check_source(config.data.source)
    if stage == "plan":
        from nuteprune.planning.models import check_named

        check_named(config.model.path)
    if stage == "run":
        for text in config.evaluate.text:
            check_source(text, "evaluate.text")
    if stage == "finetune" or (stage in ("run", "prepare") and config.finetune.data):
        check_records(config.finetune.data)
    if stage in ("recover", "finetune", "export", "distill", "load_masked"):
        check_pruned(config.run_dir)
        check_free(run_dir, stage)


def check_run(config: Config) -> None:
    """Raise `UserError` for settings of which `run` can make no chain of stages."""
    if not config.model.path:
        raise UserError("run: name a model, e.g. `nuteprune run HuggingFaceTB/SmolLM2-135M --sparsity 0.3`")
    for stage, ladder in (("export", config.export.ladder), ("recover", config.recover.ladder)):
        if ladder:
            raise UserError(f"run exports one model: give {stage}.ladder to `nuteprune {stage}` behind it")
    final = config.sparsity.target
    tuned, exported = config.finetune.sparsity or final, config.export.sparsity or final
    if config.finetune.data and tuned != exported:
        raise UserError(f"run would fine-tune the student at {tuned:g} and export that at {exported:g}: set both alike")


def several_ranks() -> bool:
    """Whether a launcher has started this process as one of several."""
    sizes = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    return any(os.environ.get(name, "1") not in ("", "1") for name in sizes)


@contextmanager
def _as_it_was() -> Iterator[None]:
    """A block behind which the process is as before it; what libraries say is kept low in it."""
    hook, environment = sys.excepthook, dict(os.environ)
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    spoken = [(each, each.level, each.handlers[:], each.propagate)
              for each in loggers if isinstance(each, logging.Logger)]  # fmt: skip
    with warnings.catch_warnings():
        import numpy as np
        import torch
        from huggingface_hub import constants
        from transformers.utils import logging as transformers_logging

        bars, offline = transformers_logging.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE
        threads = torch.get_num_threads()
        python, numpy, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
        cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        hush()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(host)
            if cards:
                torch.cuda.set_rng_state_all(cards)
            torch.set_num_threads(threads)
            constants.HF_HUB_OFFLINE = offline
            if bars:
                transformers_logging.enable_progress_bar()
            for logger, level, handlers, propagate in spoken:
                logger.setLevel(level)  # which forgets what it has worked out of levels
                logger.handlers[:], logger.propagate = handlers, propagate
            sys.excepthook = hook  # a process group has one of its own
            os.environ.clear()
            os.environ.update(environment)


def module(name: str) -> Any:
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
