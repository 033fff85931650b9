"""Models side by side: perplexity, speed, lm-eval tasks and what each writes, and a report that compares them."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.config import Config, EvaluateConfig
from nuteprune.data.sequences import first_tokens
from nuteprune.errors import UserError
from nuteprune.evaluation import generation, report
from nuteprune.evaluation.generation import Continued
from nuteprune.evaluation.measure import SIZES, environment, perplexity, sizes, window_spans
from nuteprune.evaluation.models import USABLE, Known, load_weights, read_any, weight_bytes
from nuteprune.evaluation.pictures import training_seconds
from nuteprune.evaluation.protocol import ScoredText, scored_texts, short_names
from nuteprune.evaluation.retention import Scored, means, retained
from nuteprune.evaluation.speed import SPEEDS, ceiling, speed, speed_ratio
from nuteprune.evaluation.tasks import lm_eval_tasks, load_tasks
from nuteprune.exporting.card import RECORD, add_results, check_distilled
from nuteprune.exporting.publish import check_repository, push
from nuteprune.parallel.distributed import discover
from nuteprune.runs.checkpoint import MANIFEST, CheckpointError
from nuteprune.runs.directories import DISTILLED, distill_directory, instruct_directory
from nuteprune.runs.words import one_line
from nuteprune.training.tracking import Tracker, check_reporters

log = logging.getLogger(__name__)

COMMAND = ("nuteprune", "__main__")
"""Names of the program where its arguments are a command of ours."""


def evaluate_models(config: Config) -> dict:
    """Evaluate the base model and the export (or `evaluate.models`) and write the report, also into the exports' cards.

    Models are measured one after the other, except that their speeds are measured in turns, for which all of
    them are on the device together; where they do not fit, the report says so instead. Where no speed is measured, only
    one is in memory at a time. report.json is written after each part, so that what ends the run costs one part.

    Returns:
        The report, as written to `report.json`; see `report.write` for the directory.

    Raises:
        UserError: a missing model, text, task or output directory; a text shorter than one window.
    """
    settings = config.evaluate
    paths, output = _model_paths(config), report_directory(config)
    if not settings.text and settings.protocol == "own":
        source = config.data.source
        log.warning("evaluate.text is empty: perplexity is of the training text (%s), not held out", source)
    device = discover().device
    tasks, known = checked(config, paths)
    wanted = [weight_bytes(path, config.model) for path in paths] if settings.batch_sizes else []
    too_big = too_big_together(wanted, device)
    entries: list[dict[str, Any]] = []
    models, streams, firsts = [], [], []
    continued: list[Continued] = []
    answered: list[Scored] = []
    draft = {"models": entries, "dtype": config.model.dtype, "environment": environment(device)}

    def keep(entry: dict, part: dict) -> None:
        entry |= part
        report.write_draft(draft, output)

    for name, path, (found, texts) in zip(short_names(paths), paths, known, strict=True):
        model, tokenizer = load_weights(path, config.model, found, device), found.tokenizer
        streams.append(torch.cat([text.tokens for text in texts]))
        firsts.append(first_tokens(tokenizer))
        entries.append({"name": name, "path": path, **sizes(model, found.folder), "perplexity": {},
                        "first_tokens": tokenizer.convert_ids_to_tokens(list(firsts[-1]))})  # fmt: skip
        for part in _quality(
            model, tokenizer, texts, tasks, continued, answered, settings, config.tracking.progress, name
        ):
            keep(entries[-1], part)
        if settings.batch_sizes and not too_big:
            models.append(model.to("cpu"))
        del model
    if models:
        too_big = _speeds(models, firsts, device, settings, entries, keep)
    for entry, examples in zip(entries, answered, strict=False):
        entry["retained"] = retained(answered[0], examples)
    for entry in entries:
        for text, score in entry["perplexity"].items():
            score["delta_nll"] = score["nll"] - entries[0]["perplexity"][text]["nll"]
    published = settings.protocol == "published"
    result: dict[str, Any] = {
        "protocol": settings.protocol,
        "models": entries,
        "ratio": _ratio(entries[0], entries[-1]) if len(entries) > 1 else {},
        "held_out": bool(settings.text or published)
        and not any(shares_text(text, config.data.source) for text in settings.text),
        "same_tokens": all(torch.equal(streams[0], other) for other in streams[1:]),
        "task_limit": 0 if published else settings.task_limit,
        "speed_missing": too_big,
        "made": {
            "seconds": training_seconds(Path(config.run_dir)) if config.run_dir else {},
            "command": shlex.join(["nuteprune", *sys.argv[1:]]) if Path(sys.argv[0]).stem in COMMAND else "",
        },
    } | {key: draft[key] for key in ("dtype", "environment")}
    written = report.write(result, output, Path(config.run_dir) if config.run_dir else None)
    for entry in entries[1:]:
        if (Path(entry["path"]) / RECORD).is_file():
            _into_card(result, entries[0], entry)
    if config.run_dir:
        _to_tracker(result, report.results(written), config)
    if config.export.push_to_hub:
        push(Path(paths[-1]), config.export)
    return written


def checked(config: Config, paths: list[str]) -> tuple[list, list[tuple[Known, list[ScoredText]]]]:
    """Tasks, and what is known of each model with the texts in its tokens; so that a mistake costs no evaluation and no
    earlier report, it is found here, before weights are read. Raises as `evaluate_models`."""
    settings = config.evaluate
    check_reporters(config.tracking)
    check_repository(config.export)
    tasks, known = load_tasks(settings.tasks, settings.trust_remote_code), []
    for path in paths:
        found = read_any(path, config.model, settings.trust_remote_code)
        texts = scored_texts(settings, config.data, found.tokenizer)
        for text in texts:
            window_spans(len(text.tokens), text.window, text.blocks, len(text.first))
        known.append((found, texts))
    return tasks, known


def _quality(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[ScoredText], tasks: list,
    continued: list[Continued], answered: list[Scored], settings: EvaluateConfig, shown: bool, name: str,
) -> Iterator[dict]:  # fmt: skip
    """Everything measured of one model but its speed, part by part; `continued` and `answered` get what it writes and
    how its answers score."""
    scores = {}
    log.info("evaluating %s", name)
    window, most = max(text.window for text in texts), getattr(model.config, "max_position_embeddings", None)
    if most and window > most:
        hint = "" if settings.protocol == "published" else " (evaluate.window)"
        log.warning("perplexity in windows of %d tokens, of which %s reads %d at most: its numbers say little%s",
                    window, name, most, hint)  # fmt: skip
    for text in texts:
        label = f"{text.name} by {name}" if shown else None
        how = (text.window, text.blocks, label, text.first)
        score = perplexity(model, text.tokens, *how)
        windows = text.tokens[: score["blocks"] * (text.window - len(text.first))].view(score["blocks"], -1)
        scored = tokenizer.decode(windows[:, 0 if text.first else 1 :].flatten())
        bits, size = score["nll"] * score["tokens"] / math.log(2), len(scored.encode())
        scores[text.name] = score | {"bytes": size, "bits_per_byte": bits / size}
        yield {"perplexity": scores}
    if tasks:
        limit, shots = (0, 0) if settings.protocol == "published" else (settings.task_limit, settings.fewshot)
        measured, examples = lm_eval_tasks(model, tokenizer, tasks, limit, shots)
        answered.append(examples)
        yield {"tasks": measured, "accuracy": means(examples)}
    if settings.prompts:
        continued.append(generation.continue_text(model, tokenizer, texts[0].tokens, settings.prompts))
        intact = continued[0] if len(continued) > 1 else None
        yield {
            "generation": generation.score(model, continued[-1], intact),
            "samples": generation.samples(tokenizer, continued[-1]),
        }


def _speeds(
    models: list[PreTrainedModel], firsts: list[tuple[int, ...]], device: torch.device, settings: EvaluateConfig,
    entries: list[dict], keep: Callable[[dict, dict], None],
) -> str:  # fmt: skip
    """Measure each model by number of sequences; returns why some were not measured, empty where all were."""
    done = ""
    try:
        on_device = [model.to(device) for model in models]
        for batch in settings.batch_sizes:
            log.info("measuring speed in turns, %d at once", batch)
            measured = speed(on_device, settings.prompt_tokens, settings.new_tokens, batch, firsts=firsts)
            for entry, result in zip(entries, measured, strict=True):
                keep(entry, {"speed": entry.get("speed", {}) | {str(batch): result}})
            done = f"for more than {batch} sequences "
    except torch.OutOfMemoryError:
        missing = f"{done}the models and their caches do not fit on the device together"
        log.warning("speed not measured: %s", missing)
        return missing
    return ""


def too_big_together(sizes: list[int], device: torch.device) -> str:
    """Why models of so many bytes cannot take turns on a device, empty where they can (on a CPU always)."""
    if device.type != "cuda" or sum(sizes) <= (
        usable := USABLE * torch.cuda.get_device_properties(device).total_memory
    ):
        return ""
    missing = f"the models take {sum(sizes) / 1e9:.1f} GB together, of which {usable / 1e9:.1f} GB fit on the device"
    log.warning("speed will not be measured: %s", missing)
    return missing


def _model_paths(config: Config) -> list[str]:
    """Models to evaluate, the base first."""
    if config.evaluate.models:
        return list(config.evaluate.models)
    if not config.model.path:
        raise UserError("model.path: name the base model, or the models to evaluate in evaluate.models")
    if not (config.export.output or config.run_dir):
        raise UserError("run_dir: name the run whose export is evaluated, or set evaluate.models")
    export = Path(config.export.output or Path(config.run_dir) / "export")
    if not (export / "config.json").is_file():
        raise UserError(f"no exported model at {export}: run the export stage first, or set evaluate.models")
    distilled = distill_directory(Path(config.run_dir)) / DISTILLED
    newer = [distilled] if config.run_dir and check_distilled(distilled, export) else []
    instructed = instruct_directory(Path(config.run_dir)) / DISTILLED
    if newer and check_distilled(instructed, distilled, "instructed_from", "finetune"):
        newer.append(instructed)
    return [config.model.path, *map(str, [export, *newer])]


def shares_text(text: str, source: str) -> bool:
    """Whether a text is what `data.source` names, or one of the two lies in the other."""
    if "c4" in (text, source) or not source:  # no paths
        return text == source
    paths = Path(text).resolve(), Path(source).resolve()
    return paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0])


def report_directory(config: Config) -> Path:
    """Where the report goes; raises `UserError` where neither it nor a run is named."""
    if not (config.evaluate.output or config.run_dir):
        raise UserError("evaluate.output: name the directory of the report (or set run_dir)")
    output = Path(config.evaluate.output or Path(config.run_dir) / "evaluate")
    if output.exists() and not output.is_dir():
        raise UserError(f"evaluate.output: {output} is a file, where the directory of the report should be")
    if (output / MANIFEST).is_file() and not (output / "report.json").is_file():
        raise UserError(f"evaluate.output: {output} holds something else of ours, as a model: choose another directory")
    return output


def _ratio(first: dict, last: dict) -> dict:
    """The last model's sizes, perplexities, speeds and memory over the first's, and the ceiling of its speed."""
    ratio = {key: last[key] / first[key] if first[key] else None for key in SIZES}
    ratio["perplexity"] = {
        text: last["perplexity"][text]["perplexity"] / before["perplexity"]
        for text, before in first["perplexity"].items()
    }
    if "speed" in first:
        pairs = {batch: (before, last["speed"][batch]) for batch, before in first["speed"].items()}
        ratio["speed"] = {batch: speed_ratio(*pair) | _memory_ratio(*pair) for batch, pair in pairs.items()}
        if first["parameters_prunable"]:  # none in families whose projections go by other names, as GPT-2's
            ratio["ceiling"] = ceiling(first, last)
    return ratio


def _memory_ratio(before: dict, after: dict) -> dict:
    key = "peak_memory_bytes"
    return {} if before[key] is None or after[key] is None else {key: after[key] / before[key]}


def _into_card(result: dict, first: dict, entry: dict) -> None:
    """Put what was measured of one of our exports into its card."""
    pair = {"models": [first, entry], "ratio": _ratio(first, entry)}
    try:
        add_results(Path(entry["path"]), report.for_card(result | pair))
    except (OSError, ValueError, CheckpointError) as error:
        log.warning("the results could not be put into the card of %s (%s)", entry["path"], error)


def _to_tracker(result: dict, table: str, config: Config) -> None:
    """The report's table beside the run's curves, and its numbers as `eval/MODEL/…`."""
    values: dict[str, Any] = {}
    for model in result["models"]:
        own = {key: model[key] for key in SIZES}
        own |= {f"perplexity/{text}": score["perplexity"] for text, score in model["perplexity"].items()}
        own |= {f"generation/{key}": value for key, value in model.get("generation", {}).items() if value is not None}
        for batch, measured in model.get("speed", {}).items():
            own |= {f"batch_{batch}/{key}": measured[key] for key in SPEEDS}
        for task, scores in model.get("tasks", {}).items():
            own |= {f"tasks/{task}/{metric}": score["value"] for metric, score in scores["metrics"].items()}
        values |= {one_line(f"{model['name']}/{key}"): value for key, value in own.items()}
    with Tracker(config, "eval", total_steps=1, first_step=None) as tracker:
        tracker.table("report", table, values)
