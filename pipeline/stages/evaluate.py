"""The evaluate stage: perplexity, speed, lm-eval tasks and a sample of each model, and a report that compares them."""

from __future__ import annotations

from pathlib import Path

from nuteprune.config import Config
from nuteprune.evaluation import report
from nuteprune.evaluation.compare import evaluate_models, report_directory
from nuteprune.training.tracking import watch_command


def run(config: Config) -> dict:
    """Compare the models; arguments, result and errors as of `evaluate_models`."""
    return evaluate_models(config)


def summary(config: Config, result: dict) -> str:
    """The table, a continuation of each model, and where to look next."""
    lines = [report.table(result), ""]
    if config.evaluate.sample_prompt:
        prompt = config.evaluate.sample_prompt
        lines += [f"{m['name']}: {' '.join((prompt + m['sample']).split())}" for m in result["models"]] + [""]
    lines += [f"model: {m['path']}" for m in result["models"][-1:]]
    lines.append(f"report: {report_directory(config) / 'report.md'}")
    if config.run_dir and "tensorboard" in config.tracking.report_to:
        lines.append(f"curves: {watch_command(Path(config.run_dir))}")
    return "\n".join(lines)
