"""The evaluate stage: perplexity, speed, lm-eval tasks and what each model writes, and a report that compares them."""

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
    for model in result["models"]:
        lines += [f"{model['name']}: {' '.join((s['prompt'] + s['continuation']).split())}"
                  for s in model.get("samples", [])[:1]]  # fmt: skip
    lines += [""] * ("samples" in result["models"][0])
    lines += [f"model: {m['path']}" for m in result["models"][-1:]]
    lines.append(f"report: {report_directory(config) / 'report.html'}")
    if config.run_dir and "tensorboard" in config.tracking.report_to:
        lines.append(f"curves: {watch_command(Path(config.run_dir))}")
    return "\n".join(lines)
