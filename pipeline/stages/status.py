"""The status command: how far a run is, from its directory and from SLURM where it is there. Reads only."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Collection
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from nuteprune.config import Config
from nuteprune.errors import UserError
from nuteprune.runs import jobs, lock
from nuteprune.runs.checkpoint import CheckpointError, read_json
from nuteprune.runs.directories import (
    DISTILLED,
    LEFT_OUT,
    TUNED,
    distill_directory,
    finetune_directory,
    instruct_directory,
    recover_directory,
)  # fmt: skip

TRAINING = ("prune", "recover", "finetune", "distill")
"""Stages that take steps."""
ORDER = ("prepare", "prune", "recover", "finetune", "export", "distill", "evaluate")
LATER = re.compile(r"recover-[\d.e-]+|finetune|distill")
"""Stages whose jobs `by_hand` knows by their names."""
RECENT = 20
"""Steps over which the speed is taken."""


def run(config: Config) -> dict:
    """The state of the run in `config.run_dir`.

    Returns:
        `run_dir`, `sparsity` (the target), `next` (the command that goes on), and `stages`: by name a dict with
        `state` (not started, pending, running, stopped, done, failed, left out, or SLURM's word for a job that failed,
        in small letters), `path` of the result, `job`, and where there are any `progress`, `error` and `why`. A stage
        that was started or submitted, which the run's settings do not ask for, has `asked` (False).

    Raises:
        UserError: no run directory is named.
    """
    if not config.run_dir:
        raise UserError("which run? Give its directory, or --config with the file that names it")
    run_dir = Path(config.run_dir)
    numbers, asked = jobs.submitted(run_dir), outputs(config)
    others = {stage: output for stage, output in by_hand(run_dir, numbers).items() if output not in asked.values()}
    found = {}
    for stage, output in sorted((others | asked).items(), key=lambda place: _place(*place)):
        found[stage] = _stage(run_dir, stage, output, numbers.get(stage))
        if stage not in asked:
            found[stage]["asked"] = False
    left = {stage: each for stage, each in found.items() if each["state"] != "done" and each.get("asked", True)}
    if left and all(each["job"] is None for each in found.values()):
        _of_the_whole_run(run_dir, next(iter(left.values())))
    reasons: dict[str, str] = {}
    with suppress(CheckpointError):
        reasons = read_json(run_dir / LEFT_OUT)
    found |= {stage: {"state": "left out", "path": "", "job": None, "why": str(why), "asked": False}
              for stage, why in reasons.items() if stage in ORDER and stage not in found}  # fmt: skip
    places = sorted(found, key=lambda stage: _place(stage, Path(found[stage]["path"])))
    return {
        "run_dir": str(run_dir), "sparsity": config.sparsity.target, "next": _next(run_dir, left),
        "stages": {stage: found[stage] for stage in places},
    }  # fmt: skip


def _of_the_whole_run(run_dir: Path, stage: dict) -> None:
    """Tell of `nuteprune run`, which has a lock of its own, what it does to the first stage that is not done."""
    said, held = lock.found(run_dir, "run")
    if held:
        stage["state"] = "running"
    elif said.startswith(lock.FAILED):
        stage |= {"state": "failed", "error": said.removeprefix(lock.FAILED)}


def _next(run_dir: Path, left: dict[str, dict]) -> str:
    left = {stage: each for stage, each in left.items() if stage != "prepare"}  # `prune` prepares by itself
    if not left or any(each["state"] in ("running", "pending") for each in left.values()):
        return ""
    if (settings := run_dir / "run.yaml").is_file():
        return f"nuteprune run --config {settings}"
    return f"nuteprune {_kind(next(iter(left)))} {run_dir}"


def outputs(config: Config) -> dict[str, Path]:
    """The stages of the run's chain in order, and the directory of each one's result; `recover-0.1` is one rung's."""
    run_dir, tune = Path(config.run_dir), config.finetune
    target = config.sparsity.target
    found = {"prepare": run_dir / "prepared", "prune": run_dir / "pruned"}
    found |= {f"recover-{rung:g}": recover_directory(run_dir, target, rung) / TUNED for rung in config.recover.ladder}
    whole = bool(config.distill.steps) and not config.export.ladder and not tune.sparsity
    if tune.data and not whole:
        found["finetune"] = finetune_directory(run_dir, target, tune.sparsity) / TUNED
    if config.export.ladder:  # evaluated as it is exported
        return found | {"export": Path(config.export.output or run_dir / "ladder")}
    found["export"] = Path(config.export.output or run_dir / "export")
    if config.distill.steps:
        found["distill"] = distill_directory(run_dir) / DISTILLED
    if tune.data and whole:
        found["finetune"] = instruct_directory(run_dir) / DISTILLED
    return found | {"evaluate": Path(config.evaluate.output or run_dir / "evaluate")}


def by_hand(run_dir: Path, submitted: Collection[str]) -> dict[str, Path]:
    """Stages that train a student on and have a directory in the run's, or a job that may not have begun, and the
    directory of each one's result."""
    waiting = sorted(stage for stage in submitted if LATER.fullmatch(stage))
    tuned = [run_dir / "finetune", *sorted(run_dir.glob("recover-*")), *sorted(run_dir.glob("finetune-*"))]
    found = {path.name: path / TUNED for path in (*tuned, *(run_dir / stage for stage in waiting))}
    found["distill"] = distill_directory(run_dir) / DISTILLED
    if (instructed := instruct_directory(run_dir)).is_dir():
        found["finetune"] = instructed / DISTILLED
    return {stage: output for stage, output in found.items() if stage in waiting or output.parent.is_dir()}


def _place(stage: str, output: Path) -> int:
    """Where a stage stands among the others; the distilled model learns from records last."""
    whole = stage == "finetune" and output.name == DISTILLED
    return ORDER.index("evaluate" if whole else _kind(stage))


def _kind(stage: str) -> str:
    """Of `recover-0.1` recover."""
    return stage.partition("-")[0]


def _stage(run_dir: Path, stage: str, output: Path, number: str | None) -> dict:
    job = jobs.find(number) if number else jobs.SlurmJob("")
    done, kind = (output / "manifest.json").is_file(), _kind(stage)
    said, held = lock.found(output.parent, kind) if kind in TRAINING else ("", False)
    fault = said.removeprefix(lock.FAILED) if said.startswith(lock.FAILED) else ""
    steps = progress(output.parent, kind) if kind in TRAINING and not done else None
    state = job.standing or (
        "done" if done else "running" if held else job.state.lower() if job.failed else "failed" if fault
        else "stopped" if steps or output.is_dir() or (said and kind in TRAINING) else "not started"
    )  # fmt: skip
    found = {"state": state, "path": str(output), "job": vars(job) if number else None}
    if steps:
        if state != "running":
            del steps["seconds_left"]
        found["progress"] = steps
    if job.failed and not done:
        found["error"] = jobs.first_error(run_dir, job)
    elif state == "failed":
        found["error"] = fault
    return found


def progress(directory: Path, stage: str) -> dict | None:
    """Where training is, from metrics.jsonl and the checkpoints; None before the first step."""
    wanted = "step", "total", f"{stage}/step_s", f"{stage}/tokens_per_s"
    lines = [line for line in _entries(directory / "metrics.jsonl") if all(_is_number(line.get(key)) for key in wanted)]
    if not lines:
        return None
    last = lines[-1]
    seconds = statistics.median(line[f"{stage}/step_s"] for line in lines[-RECENT:])
    checkpoints = [path.name.removeprefix("step-") for path in (directory / "checkpoints").glob("step-*")]
    found = {"step": last["step"] + 1, "total": last["total"]}
    for name in ("expected_sparsity", "target_sparsity", "teacher_sparsity", "tokens_per_s", "loss"):
        if _is_number(last.get(f"{stage}/{name}")):
            found[name] = last[f"{stage}/{name}"]
    return found | {
        "seconds_left": round(seconds * (found["total"] - found["step"])),
        "last_step_seconds_ago": round(time.time() - (directory / "metrics.jsonl").stat().st_mtime),
        "checkpoint": max((int(step) for step in checkpoints if step.isdecimal()), default=None),
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _entries(path: Path) -> list[dict]:
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # the line that is being written
            continue
        entries += [entry] if isinstance(entry, dict) else []
    return entries


def text(status: dict) -> str:
    """The status for people."""
    lines = [f"{status['run_dir']}, sparsity {status['sparsity']:.0%}"]
    width = max(9, *map(len, status["stages"]))
    for stage, found in status["stages"].items():
        job = found["job"]
        words = [f"  {stage:<{width}} {found['state']:<11}"]
        if job:
            words.append(f"job {job['number']} {job['state'] or '(SLURM has forgotten it)'}")
            words += [f"on {job['nodes']}"] if job["nodes"] else []
            words += [f"({job['reason']})"] if job["reason"] else []
            words += [f"restarts: {job['restarts']}"] if job["restarts"] else []
        words += [found["path"]] if found["state"] == "done" else [found["why"]] if "why" in found else []
        lines.append(" ".join(words).rstrip())
        if found.get("progress"):
            lines += [f"  {'':<{width}} {line}" for line in _progress_text(found["progress"])]
        if found.get("error"):
            lines.append(f"  {'':<{width}} error: {found['error']}")
    return "\n".join([*lines, f"next: {status['next']}"] if status["next"] else lines)


def _progress_text(found: dict) -> list[str]:
    parts = [f"step {found['step']:,} of {found['total']:,}"]
    if {"expected_sparsity", "target_sparsity"} <= found.keys():
        teacher = f"{found['teacher_sparsity']:.1%}" if found.get("teacher_sparsity") else "the intact model"
        parts.append(f"sparsity {found['expected_sparsity']:.1%} (target {found['target_sparsity']:.1%})")
        parts.append(f"teacher {teacher}")
    parts.append(f"{found['tokens_per_s']:,.0f} tokens/s")
    if "seconds_left" in found:
        parts.append(f"{timedelta(seconds=found['seconds_left'])} left")
    saved = "none yet" if found["checkpoint"] is None else f"step {found['checkpoint']:,}"
    ago = timedelta(seconds=found["last_step_seconds_ago"])
    return [", ".join(parts), f"last step {ago} ago; last checkpoint: {saved}"]


def table(status: dict) -> str:
    """The status for `slurm/submit.sh`: the run directory, then asked for stages, state and job, between tabs."""
    rows: list[tuple[str, ...]] = [("run_dir", status["run_dir"])]
    rows += [(stage, found["state"], (found["job"] or {}).get("number", ""))
             for stage, found in status["stages"].items() if found.get("asked", True)]  # fmt: skip
    return "\n".join("\t".join(row) for row in rows)
