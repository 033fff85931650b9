"""Models side by side: perplexity, speed, lm-eval tasks and a sample of each, and a report that compares them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.config import Config, ConfigError
from nuteprune.data.text import text_tokens
from nuteprune.evaluation import report
from nuteprune.evaluation.measure import SIZES, environment, perplexity, sample, sizes
from nuteprune.evaluation.speed import SPEEDS, ceiling, speed, speed_ratio
from nuteprune.evaluation.tasks import lm_eval_tasks, load_tasks, mean_accuracy
from nuteprune.exporting.card import RECORD, add_results
from nuteprune.exporting.publish import push
from nuteprune.model.loading import load_any
from nuteprune.parallel.distributed import discover
from nuteprune.runs.checkpoint import CheckpointError
from nuteprune.runs.words import one_line
from nuteprune.training.tracking import Tracker, check_reporters

log = logging.getLogger(__name__)


def evaluate_models(config: Config) -> dict:
    """Evaluate the base model and the export (or `evaluate.models`) and write the report, also into the exports' cards.

    Models are measured one after the other, except that their speeds are measured in turns, for which all of
    them are on the device together; without `evaluate.speed` only one is in memory at a time.

    Returns:
        The report, as written to `report.json`; see `report.write` for the directory.

    Raises:
        ConfigError: a missing model, text, task or output directory; a text shorter than one window.
    """
    settings = config.evaluate
    paths, output = _model_paths(config), report_directory(config)
    device = discover().device
    check_reporters(config.tracking)
    # First, so that a mistake in them costs no evaluation.
    tasks = load_tasks(settings.tasks, settings.trust_remote_code)
    entries, models, streams = [], [], []
    for name, path in zip(_names(paths), paths, strict=True):
        model, tokenizer, folder = load_any(path, config.model, settings.trust_remote_code)
        texts = _texts(config, tokenizer)
        streams.append(torch.cat(list(texts.values())))
        entry = {"name": name, "path": path, **sizes(model, folder)}
        entries.append(entry | _quality(model.to(device), tokenizer, texts, tasks, config, name))
        if settings.speed:
            models.append(model.to("cpu"))
    if settings.speed:
        for entry, measured in zip(entries, _speeds(models, device, config), strict=True):
            entry["speed"] = measured
    for entry in entries if entries[0].get("accuracy") else ():
        entry["retained"] = entry["accuracy"] / entries[0]["accuracy"]
    result = {
        "models": entries,
        "ratio": _ratio(entries[0], entries[-1]) if len(entries) > 1 else {},
        "held_out": bool(settings.text) and config.data.source not in settings.text,
        "same_tokens": all(torch.equal(streams[0], other) for other in streams[1:]),
        "task_limit": settings.task_limit,
        "prompt": settings.sample_prompt,
        "dtype": config.model.dtype,
        "environment": environment(device),
    }
    written = report.write(result, output, Path(config.run_dir) if config.run_dir else None)
    for entry in entries[1:]:
        if (Path(entry["path"]) / RECORD).is_file():
            _into_card(result, entries[0], entry)
    if config.run_dir:
        _to_tracker(result, report.results(written), config)
    if config.export.push_to_hub:
        push(Path(paths[-1]), config.export)
    return written


def _quality(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, torch.LongTensor],
    tasks: list,
    config: Config,
    name: str,
) -> dict:
    """Everything measured of one model but its speed."""
    settings = config.evaluate
    log.info("evaluating %s", name)
    result = {"perplexity": {}}
    for text, tokens in texts.items():
        label = f"{text} by {name}" if config.tracking.progress else None
        score = perplexity(model, tokens, settings.window, settings.stride, settings.blocks, label)
        result["perplexity"][text] = score
    if tasks:
        result["tasks"] = lm_eval_tasks(model, tokenizer, tasks, settings.task_limit, settings.fewshot)
        result["accuracy"] = mean_accuracy(result["tasks"])
    if settings.sample_prompt:
        result["sample"] = sample(model, tokenizer, settings.sample_prompt)
    return result


def _speeds(models: list[PreTrainedModel], device: torch.device, config: Config) -> list[dict]:
    """Speed of each model by number of sequences."""
    settings = config.evaluate
    measured: list[dict] = [{} for _ in models]
    try:
        on_device = [model.to(device) for model in models]
        for batch in settings.batch_sizes:
            log.info("measuring speed in turns, %d at once", batch)
            for own, result in zip(
                measured, speed(on_device, settings.prompt_tokens, settings.new_tokens, batch), strict=True
            ):
                own[str(batch)] = result
        return measured
    except torch.OutOfMemoryError:
        raise ConfigError(
            "the models do not fit on the device together, which measuring their speeds in turns needs: "
            "set evaluate.speed=false or name fewer in evaluate.models"
        ) from None


def _texts(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.LongTensor]:
    """The texts for perplexity as tokens `[n]` by name: `evaluate.text`, or else the text the run is trained on."""
    texts, field = config.evaluate.text, config.evaluate.text_field
    if texts:
        named = zip(_names(texts), texts, strict=True)
        return {name: text_tokens(text, field, tokenizer) for name, text in named}
    source = config.data.source
    log.warning("evaluate.text is empty: perplexity is of the training text (%s), not held out", source)
    return {Path(source).name: text_tokens(source, config.data.text_field, tokenizer, config.data.documents)}


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


def report_directory(config: Config) -> Path:
    """Where the report goes; raises `ConfigError` where neither it nor a run is named."""
    if not (config.evaluate.output or config.run_dir):
        raise ConfigError("evaluate.output: name the directory of the report (or set run_dir)")
    return Path(config.evaluate.output or Path(config.run_dir) / "evaluate")


def _names(paths: list[str]) -> list[str]:
    """Short names: the last part of each path, or the paths themselves where two share it."""
    short = [Path(path).name or path for path in paths]
    return short if len(set(short)) == len(short) else paths


def _ratio(first: dict, last: dict) -> dict:
    """The last model's sizes, perplexities, speeds and memory over the first's, and the ceiling of its speed."""
    ratio = {key: last[key] / first[key] if first[key] else None for key in SIZES}
    ratio["perplexity"] = {
        text: last["perplexity"][text]["perplexity"] / before["perplexity"]
        for text, before in first["perplexity"].items()
    }
    if "retained" in last:
        ratio["accuracy"] = last["retained"]
    if "speed" in first:
        pairs = {batch: (before, last["speed"][batch]) for batch, before in first["speed"].items()}
        ratio["speed"] = {batch: speed_ratio(*pair) | _memory_ratio(*pair) for batch, pair in pairs.items()}
        ratio["ceiling"] = ceiling(first, last)
    return ratio


def _memory_ratio(before: dict, after: dict) -> dict:
    key = "peak_memory_bytes"
    return {} if before[key] is None or after[key] is None else {key: after[key] / before[key]}


def _into_card(result: dict, first: dict, entry: dict) -> None:
    """Put what was measured of one of our exports into its card."""
    pair = {"models": [first, entry], "ratio": _ratio(first, entry)}
    try:
        add_results(Path(entry["path"]), report.results(result | pair))
    except (OSError, ValueError, CheckpointError) as error:
        log.warning("the results could not be put into the card of %s (%s)", entry["path"], error)


def _to_tracker(result: dict, table: str, config: Config) -> None:
    """The report's table beside the run's curves, and its numbers as `eval/MODEL/…`."""
    values = {}
    for model in result["models"]:
        own = {key: model[key] for key in SIZES}
        own |= {f"perplexity/{text}": score["perplexity"] for text, score in model["perplexity"].items()}
        for batch, measured in model.get("speed", {}).items():
            own |= {f"batch_{batch}/{key}": measured[key] for key in SPEEDS}
        for task, scores in model.get("tasks", {}).items():
            own |= {f"tasks/{task}/{metric}": score["value"] for metric, score in scores["metrics"].items()}
        values |= {one_line(f"{model['name']}/{key}"): value for key, value in own.items()}
    with Tracker(config, "eval", total_steps=1, first_step=None) as tracker:
        tracker.table("report", table, values)
