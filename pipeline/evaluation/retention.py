"""What a pruned model retains of the intact one's score in multiple-choice tasks: the paper's measure (section 4.1).

Shape letter: N examples of a task.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

METRICS = ("acc", "acc_norm")
DRAWS = 2000
"""Bootstrap draws behind an interval of 95%."""

Scored = dict[str, dict[str, list[float]]]
"""By task, by metric and `chance`, a number for each of its N examples."""


def scored_examples(results: dict, tasks: list) -> Scored:
    """What lm-eval gave each example of the tasks that were asked for; tasks without `acc` are left out.

    Args:
        results: of lm-eval's `simple_evaluate` with `log_samples`.
        tasks: its task and group objects. A group counts as one task of all its examples.
    """
    found = {}
    for task in tasks:
        examples = [each for name in _names(task) for each in results["samples"].get(name, [])]
        examples = [each for each in examples if "acc" in each and each["filter"] == "none"]
        if examples:
            # A task without acc_norm counts by its acc, as in published means.
            scores = {metric: [float(each.get(metric, each["acc"])) for each in examples] for metric in METRICS}
            # One answer to judge, as in LAMBADA, is no choice among several: nobody guesses it.
            choices = [len(each["filtered_resps"]) for each in examples]
            chance = [1 / count if count > 1 else 0.0 for count in choices]
            found[task.task_name if hasattr(task, "task_name") else task.name] = scores | {"chance": chance}
    return found


def _names(task: Any) -> Iterable[str]:
    """Names of a task, or of the tasks of a group."""
    return [task.task_name] if hasattr(task, "task_name") else [name for each in task for name in _names(each)]


def means(scored: Scored) -> dict[str, float]:
    """Mean over the tasks of `acc`, `acc_norm` and `chance`; empty without tasks."""
    keys = (*METRICS, "chance") if scored else ()
    return {key: float(np.mean([np.mean(task[key]) for task in scored.values()])) for key in keys}


def retained(before: Scored, after: Scored) -> dict[str, dict[str, float]]:
    """The share of the first model's mean score that another keeps, by metric.

    Returns:
        `value`; `low` and `high`, the ends of its interval of 95% over bootstrap draws of the examples, the same for
        both models (paired); `above_chance`, the share kept of what is above guessing, where the first model is above.
        Metrics in which the first model scores nothing are left out.
    """
    drawn = _drawn(before, after)
    found, first, last = {}, means(before), means(after)
    for metric, (base, own) in drawn.items():
        if not first[metric]:
            continue
        low, high = np.percentile(own[base > 0] / base[base > 0], (2.5, 97.5))
        found[metric] = {"value": last[metric] / first[metric], "low": float(low), "high": float(high)}
        if first[metric] > first["chance"]:
            above = (last[metric] - first["chance"]) / (first[metric] - first["chance"])
            found[metric]["above_chance"] = above
    return found


def _drawn(before: Scored, after: Scored) -> dict[str, np.ndarray]:
    """By metric the mean scores [2, DRAWS] of both models over the tasks, their examples drawn with replacement."""
    random = np.random.default_rng(0)
    drawn = {metric: np.zeros((2, DRAWS)) for metric in METRICS if before}
    for name, task in before.items():
        both = np.array([[model[metric] for metric in METRICS] for model in (task, after[name])])  # [2, metrics, N]
        for draw in range(DRAWS):
            score = both[:, :, random.integers(both.shape[2], size=both.shape[2])].mean(2)
            for metric, column in zip(METRICS, score.T, strict=True):
                drawn[metric][:, draw] += column / len(before)
    return drawn
