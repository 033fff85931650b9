"""lm-eval tasks on a model in memory: those it knows by name, task files of the user, and the ones that ship here."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from pathlib import Path

import datasets
import yaml
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data.sequences import first_tokens
from nuteprune.errors import UserError, first_line
from nuteprune.evaluation.retention import Scored, scored_examples

SHIPPED = Path(__file__).parent
PAPER = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The zero-shot tasks of the paper (section 4.1), by lm-eval's names; `paper` stands for all of them."""
BATCH = 8
"""Requests a forward pass scores at once; fixed, because padding moves the last digits of a score."""


def lm_eval_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list, limit: int, fewshot: int
) -> tuple[dict[str, dict], Scored]:
    """Score a model with lm-evaluation-harness in this process.

    Args:
        model: causal language model on its device.
        tokenizer: its tokenizer; where it begins a sequence with a token, every request begins with it.
        tasks: from `load_tasks`; they may be used for one model after another.
        limit: examples per task; 0 takes all.
        fewshot: examples shown before each question.

    Returns:
        By task (groups too): `metrics` {name: {"value", "stderr" (None where lm-eval has none)}}, `version`, `fewshot`,
        `examples` and, of multiple choice, `chance` (the score of guessing); and the scores of each example.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    begins = bool(first_tokens(tokenizer))
    with _quiet():
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=_unended(tokenizer), batch_size=BATCH, add_bos_token=begins),
            tasks=tasks,
            num_fewshot=fewshot,
            limit=limit or None,
            log_samples=True,
            task_manager=TaskManager(include_defaults=False),  # the tasks are loaded: nothing to look up
        )
    scored = scored_examples(results, tasks)
    summaries = {name: _summary(results, name) for name in results["results"]}
    for name, task in scored.items():
        summaries[name]["chance"] = sum(task["chance"]) / len(task["chance"])
    return summaries, scored


def _unended(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or one like it that puts nothing behind a text, where lm-eval would have it end each prompt."""
    first, plain = first_tokens(tokenizer), tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer("a")["input_ids"] == [*first, *plain] or not hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(first))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(zip(names, first, strict=True))
    )
    return tokenizer


def load_tasks(tasks: list[str], trust: bool = False) -> list:
    """Task (or group) objects of lm-eval with their data, fetched where it is on the hub.

    Args:
        tasks: names that lm-eval knows, `paper` for `PAPER`, names of the tasks that ship here (`local_mc`), or
            paths of task files.
        trust: whether task files that do not ship here may be read, which lets them run code.

    Raises:
        UserError: a task that is unknown, unreadable or cannot be fetched, or a task file that is not trusted.
    """
    if not tasks:
        return []
    # Imported here and above: lm-eval takes seconds to import and most evaluations do without it.
    from lm_eval.tasks import TaskManager

    names = [name for task in tasks for name in (PAPER if task == "paper" else [task])]
    files = {task: _task_file(task) for task in names}
    for task, file in files.items():
        if file is not None and file.parent != SHIPPED and not trust:
            raise UserError(
                f"evaluate.tasks: the task file '{task}' is code to lm-eval (!function, templates), which may do "
                "anything you can: read it, then set evaluate.trust_remote_code=true"
            )
    with _quiet():
        # Indexing lm-eval's own thousands of task files takes seconds too: only where a name asks for them.
        manager = TaskManager(include_defaults=None in files.values())
        return [item for task, file in files.items() for item in _load(manager, task, file)]


def _load(manager, task: str, file: Path | None) -> list:
    """The objects of one name or file: a group, which brings its tasks with it, or the tasks of a tag, or one task."""
    if file is None and task not in manager.all_tasks:
        raise UserError(
            f"evaluate.tasks: lm-eval knows no task '{task}': give a name it knows, {', '.join(shipped())}, "
            "or the path of a task file (.yaml)"
        )
    try:
        built = manager.load([task if file is None else _from_file(file)])
    except Exception as error:
        # Tasks are foreign code that fetches foreign data: whatever goes wrong in one is told by its name.
        raise UserError(
            f"evaluate.tasks: task '{task}' cannot be loaded (without a hub use {', '.join(shipped())} or a task "
            f"file with local data): {first_line(error)}"
        ) from error
    return [built["groups"][task]] if task in built.get("groups", {}) else list(built["tasks"].values())


def shipped() -> list[str]:
    """Names of the tasks that ship beside this file."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def _task_file(task: str) -> Path | None:
    """The task file that a name or path stands for; None for one of lm-eval's own names."""
    if task in shipped():
        return SHIPPED / f"{task}.yaml"
    if task.endswith((".yaml", ".yml")):
        if not Path(task).is_file():
            raise UserError(f"evaluate.tasks: task file '{task}' not found")
        return Path(task)
    return None


def _from_file(file: Path) -> dict | str:
    """What lm-eval's TaskManager loads for a task file.

    Local data files become absolute: they are meant relative to the task file, and lm-eval takes them relative to the
    working directory. Files with lm-eval's own tags or includes, and those without data files, it reads itself.
    """
    try:
        task = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return str(file)
    kwargs = task.get("dataset_kwargs") if isinstance(task, dict) and "include" not in task else None
    if not isinstance(kwargs, dict) or "data_files" not in kwargs:
        return str(file)
    return {**task, "dataset_kwargs": {**kwargs, "data_files": _absolute(kwargs["data_files"], file.parent.resolve())}}


def _absolute(files: str | list | dict, folder: Path) -> str | list | dict:
    if isinstance(files, dict):
        return {split: _absolute(item, folder) for split, item in files.items()}
    if isinstance(files, list):
        return [_absolute(item, folder) for item in files]
    return files if "://" in files else str(folder / files)


def _summary(results: dict, name: str) -> dict:
    """One task's entry of lm-eval's results; its keys are "metric,filter" and "metric_stderr,filter"."""
    metrics = {}
    for key, value in results["results"][name].items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = results["results"][name].get(f"{metric}_stderr,{filtered}")
        label = metric if filtered == "none" else key
        metrics[label] = {"value": value, "stderr": stderr if isinstance(stderr, float) else None}
    return {
        "metrics": metrics,
        "version": results["versions"].get(name),
        "fewshot": results["n-shot"].get(name),
        "examples": results.get("n-samples", {}).get(name, {}).get("effective"),
    }


@contextlib.contextmanager
def _quiet():
    """Keep the bars, advice and retries of lm-eval and the hub off the terminal; errors still come as exceptions."""
    logs = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels, off = [log.level for log in logs], datasets.are_progress_bars_disabled()
    for log in logs:
        log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        if not off:
            datasets.enable_progress_bars()
