"""The evaluate stage: perplexity, speed, lm-eval tasks and a sample of each model, and a report that compares them."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import report
from pipeline.config import Config, ConfigError
from pipeline.data import text_tokens
from pipeline.distributed import discover
from pipeline.measure import SIZES, SPEEDS, environment, perplexity, sample, sizes, speed, speed_ratio
from pipeline.models import load_any
from pipeline.tasks import lm_eval_tasks, load_tasks
from pipeline.tracking import Tracker

log = logging.getLogger(__name__)


def run(config: Config) -> dict:
    """Evaluate the base model and the export (or `evaluate.models`) and write the report.

    Models are measured one after the other, except that their speeds are measured in turns, for which all of
    them are on the device together; without `evaluate.speed` only one is in memory at a time.

    Returns:
        The report, as written to `report.json`; see `pipeline.report.write` for the directory.

    Raises:
        ConfigError: a missing model, text, task or output directory; a text shorter than one window.
    """
    settings = config.evaluate
    paths, output = _model_paths(config), _output(config)
    device = discover().device
    tasks = load_tasks(settings.tasks)  # first, so that a mistake in them costs no evaluation
    entries, models, streams = [], [], []
    for name, path in zip(_names(paths), paths, strict=True):
        model, tokenizer, folder = load_any(path, config.model)
        tokens = _tokens(config, tokenizer)
        streams.append(tokens)
        entry = {"name": name, "path": path, **sizes(model, folder)}
        entries.append(entry | _quality(model.to(device), tokenizer, tokens, tasks, config, name))
        if settings.speed:
            models.append(model.to("cpu"))
    if settings.speed:
        for entry, measured in zip(entries, _speeds(models, device, config), strict=True):
            entry["speed"] = measured
    result = {
        "models": entries,
        "ratio": _ratio(entries[0], entries[-1]) if len(entries) > 1 else {},
        "text": settings.text or config.data.source,
        "held_out": bool(settings.text) and settings.text != config.data.source,
        "same_tokens": all(torch.equal(streams[0], other) for other in streams[1:]),
        "prompt": settings.sample_prompt,
        "dtype": config.model.dtype,
        "environment": environment(device),
    }
    written = report.write(result, output, Path(config.run_dir) if config.run_dir else None)
    if config.run_dir:
        _to_tensorboard(result, config)
    return written


def _quality(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: torch.LongTensor,
    tasks: list,
    config: Config,
    name: str,
) -> dict:
    """Everything measured of one model but its speed."""
    settings = config.evaluate
    log.info("evaluating %s", name)
    label = f"perplexity of {name}" if config.tracking.progress else None
    result = {"perplexity": perplexity(model, tokens, settings.window, settings.stride, settings.blocks, label)}
    if tasks:
        result["tasks"] = lm_eval_tasks(model, tokenizer, tasks, settings.task_limit, settings.fewshot)
    if settings.sample_prompt:
        result["sample"] = sample(model, tokenizer, settings.sample_prompt)
    return result


def _speeds(models: list[PreTrainedModel], device: torch.device, config: Config) -> list[dict]:
    try:
        on_device = [model.to(device) for model in models]
        return speed(on_device, config.evaluate.prompt_tokens, config.evaluate.new_tokens)
    except torch.OutOfMemoryError:
        raise ConfigError(
            "the models do not fit on the device together, which measuring their speeds in turns needs: "
            "set evaluate.speed=false or name fewer in evaluate.models"
        ) from None


def _tokens(config: Config, tokenizer: PreTrainedTokenizerBase) -> torch.LongTensor:
    """The text for perplexity as tokens `[n]`: `evaluate.text`, or else the text the run is trained on."""
    if config.evaluate.text:
        return text_tokens(config.evaluate.text, config.evaluate.text_field, tokenizer)
    log.warning("evaluate.text is empty: perplexity is of the training text (%s), not held out", config.data.source)
    return text_tokens(config.data.source, config.data.text_field, tokenizer, config.data.documents)


def _model_paths(config: Config) -> list[str]:
    """Models to evaluate, the base first."""
    if config.evaluate.models:
        return list(config.evaluate.models)
    if not config.model.path:
        raise ConfigError("model.path: name the base model, or the models to evaluate in evaluate.models")
    if not (config.export.output or config.run_dir):
        raise ConfigError("run_dir: name the run whose export is evaluated, or set evaluate.models")
    export = Path(config.export.output or Path(config.run_dir) / "export")
    if not (export / "config.json").is_file():
        raise ConfigError(f"no exported model at {export}: run the export stage first, or set evaluate.models")
    return [config.model.path, str(export)]


def _output(config: Config) -> Path:
    if not (config.evaluate.output or config.run_dir):
        raise ConfigError("evaluate.output: name the directory of the report (or set run_dir)")
    return Path(config.evaluate.output or Path(config.run_dir) / "evaluate")


def _names(paths: list[str]) -> list[str]:
    """Short names: the last part of each path, or the paths themselves where two share it."""
    short = [Path(path).name or path for path in paths]
    return short if len(set(short)) == len(short) else paths


def _ratio(first: dict, last: dict) -> dict:
    """The last model's sizes, perplexity and speeds over the first's."""
    pairs = {key: (first[key], last[key]) for key in SIZES}
    pairs["perplexity"] = (first["perplexity"]["perplexity"], last["perplexity"]["perplexity"])
    ratio = {key: after / before if before else None for key, (before, after) in pairs.items()}
    return ratio | (speed_ratio(first["speed"], last["speed"]) if "speed" in first else {})


def _to_tensorboard(result: dict, config: Config) -> None:
    """The report's numbers as `eval/MODEL/…` scalars beside the run's own."""
    tracking = replace(config.tracking, progress=False, log_every=1)
    with Tracker(config.run_dir, tracking, total_steps=1, first_step=None, stage="eval") as tracker:
        for model in result["models"]:
            values = {key: model[key] for key in SIZES} | {
                key: model["speed"][key] for key in SPEEDS if "speed" in model
            }
            values["perplexity"] = model["perplexity"]["perplexity"]
            for task, scores in model.get("tasks", {}).items():
                values |= {f"tasks/{task}/{metric}": score["value"] for metric, score in scores["metrics"].items()}
            tracker.log(0, {f"{model['name']}/{key}": value for key, value in values.items()})


def summary(config: Config, result: dict) -> str:
    """The table, a continuation of each model, and where to look next."""
    lines = [report.table(result), ""]
    if config.evaluate.sample_prompt:
        prompt = config.evaluate.sample_prompt
        lines += [f"{m['name']}: {' '.join((prompt + m['sample']).split())}" for m in result["models"]] + [""]
    lines += [f"model: {m['path']}" for m in result["models"][-1:]]
    lines.append(f"report: {_output(config) / 'report.md'}")
    if config.run_dir:
        command = Path(sys.executable).with_name("tensorboard")
        lines.append(f"TensorBoard: {command} --logdir {Path(config.run_dir) / 'tensorboard'}")
    return "\n".join(lines)
