"""Where a part of `gpu_check` runs: its directory, its commands and what they leave; a line of its report."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

MET, MISSED, SKIPPED, TOLD = "met", "**missed**", "skipped", "-"
STEPS, EVERY = 24, 4
PYTHON, NUTEPRUNE = (sys.executable, "-m"), (sys.executable, "-m", "nuteprune")


@dataclass(frozen=True)
class Line:
    """One line of the report: what was checked, its bar, what came out, and whether the bar is met."""

    what: str
    bar: str
    found: str
    verdict: str


@dataclass
class Place:
    """Where a part runs.

    Attributes:
        out: an empty directory for its runs and logs.
        model, text: whose tokenizer the random models take, and what they are trained on.
        cuda: whether there is a card.
        until: when its budget is spent, in seconds of `time.monotonic`.
    """

    out: Path
    model: str
    text: str
    cuda: bool = field(default_factory=torch.cuda.is_available)
    until: float = math.inf

    @property
    def models(self) -> Path:
        """The directory of its random models, which go when the part has ended."""
        return self.out / "models"

    def run(self, name: str, *command: str, **variables: str) -> str:
        """Run a command with its output in `name`.log; returns what went wrong, empty if nothing did.

        It is ended, with all that it started, when the budget is spent.
        """
        log = self.out / f"{name}.log"
        with open(log, "w", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | variables)
        left = None if self.until == math.inf else max(1.0, self.until - time.monotonic())
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            kill(process)
            return f"not done when the part's time was over: see {log}"
        return f"{tail(log)} (code {code})" if code else ""

    def random_model(self, name: str, sizes: dict[str, int]) -> str:
        """Make a random model `name` below `models`; returns what went wrong."""
        flags = [word for flag, size in sizes.items() for word in (f"--{flag}", str(size))]
        made = str(self.models / name)
        command = (*PYTHON, "benchmarks.random_model", made, "--tokenizer", self.model, *flags)
        return self.run(f"make-{name}", *command)

    def settings(self, run: str, model: str, *settings: str) -> list[str]:
        """Settings of a short run `run` of the random model `model`."""
        return [
            f"run_dir={self.out / run}", f"model.path={self.models / model}", f"data.source={self.text}",
            "data.documents=0", "data.seq_len=64", f"train.steps={STEPS}", "train.batch_size=4",
            "gates.importance_tokens=1", "gates.ffn_multiple=8", f"checkpoint.every={EVERY}", "tracking.progress=false",
            "tracking.report_to=[]", "seed=1", *settings,
        ]  # fmt: skip

    def prune(self, run: str, model: str, *settings: str) -> str:
        """A short run; returns what went wrong."""
        return self.run(run, *NUTEPRUNE, "prune", *self.settings(run, model, *settings))

    def metrics(self, run: str, name: str) -> list[float]:
        """A scalar of each step of a run."""
        lines = (self.out / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [m[f"prune/{name}"] for m in map(json.loads, lines) if f"prune/{name}" in m]


def tail(log: Path) -> str:
    """The last line of a log, for a table."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:160].replace("|", "/") if lines else "no output"


def kill(process: subprocess.Popen) -> int:
    """End a process and all that it started, ranks that are sessions of their own too; returns how many ended."""
    killed = []
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        killed = [first, *first.children(recursive=True)]
    for one in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(killed[1:])
    return len(killed)


def alike(what: str, first: list[float], second: list[float], bar: float) -> Line:
    """How far the losses of two runs are apart, relatively."""
    apart = max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))
    wanted = f"losses within {bar:g}" if bar else "the same losses, bit for bit"
    return Line(what, wanted, f"{apart:.1e}", MET if apart <= bar else MISSED)
