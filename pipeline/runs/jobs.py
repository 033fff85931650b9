"""A run's SLURM jobs: which there are, how they stand, and what was the first error of one that failed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PENDING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED")
NUMBER = re.compile(r"\d+(_\d+)?")
"""A job's id, or a task of an array of jobs."""
TASK_ENDED = re.compile(r"srun: error: (?P<node>[^ :]+): tasks? (?P<rank>\d+)[^:]*: (?P<how>.+)")
"""srun's word on tasks that failed, in the order in which they did."""
LAST_START = re.compile(r".*^[^\n]* restart \d+: ", re.DOTALL | re.MULTILINE)
"""Everything in a job's log that is about earlier starts of it."""
RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Failed|Preempted)\b.*")
"""Last line of a traceback."""


@dataclass(frozen=True)
class SlurmJob:
    """A job as SLURM knows it.

    Attributes:
        number: its id.
        state: SLURM's word (RUNNING, FAILED, …); empty where SLURM knows nothing of it, or is not there.
        reason: why it waits or was ended; empty for none.
        nodes: where it runs or ran.
        restarts: times it was requeued.
    """

    number: str
    state: str = ""
    reason: str = ""
    nodes: str = ""
    restarts: int = 0

    @property
    def standing(self) -> str:
        """`pending`, `running`, or empty where it does not count any more."""
        return "pending" if self.state in PENDING else "running" if self.state in RUNNING else ""

    @property
    def failed(self) -> bool:
        """Whether it ended in another way than by finishing."""
        return self.state not in ("", "COMPLETED", *PENDING, *RUNNING)


def submitted(run_dir: Path) -> dict[str, str]:
    """The newest job of each stage, from the run directory's jobs.tsv."""
    path = run_dir / "jobs.tsv"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    pairs = (line.split("\t") for line in lines if line.count("\t") == 1)
    # Nothing but a number may become an argument of SLURM's commands, or a part of a file's name.
    return {stage: number for stage, number in pairs if NUMBER.fullmatch(number)}


def find(number: str) -> SlurmJob:
    """A job as the controller has it, or else the accounting; only its number where neither knows it."""
    fields = dict(re.findall(r"(\w+)=(\S*)", _output("scontrol", "-o", "show", "job", number)))
    if fields.get("JobState"):
        state, reason, nodes = (fields.get(key, "") for key in ("JobState", "Reason", "NodeList"))
        reason, nodes = ("" if word in ("None", "(null)") else word for word in (reason, nodes))
        return SlurmJob(number, state, reason, nodes, int(fields.get("Restarts", 0)))
    line = _output("sacct", "-nPX", "-j", number, "-o", "State,Reason,NodeList").partition("\n")[0]
    if line.count("|") == 2:
        state, reason, nodes = line.split("|")
        return SlurmJob(number, state.split()[0], "" if reason == "None" else reason, nodes)
    return SlurmJob(number)


def first_error(run_dir: Path, job: SlurmJob) -> str:
    """The error of the rank that failed first, in one line; empty where the logs tell of none.

    srun reports failed ranks in their order; what the others write afterwards is about the lost connection. A mistake
    of the user's that any rank finds is told by rank 0.
    """
    logs = next(iter(sorted((run_dir / "logs").glob(f"*-{job.number}"))), None)
    if logs is not None:
        ended = TASK_ENDED.search(_text(logs / "srun.log"))
        if ended:
            where = f"rank {ended['rank']} on {ended['node']}"
            tasks = [logs / f"rank-{ended['rank']}.log", *sorted(logs.glob("rank-*.log"))]
            error = _first_of(logs.glob("torchrun/**/stderr.log")) or next(filter(None, map(_last_error, tasks)), "")
            return f"{where}: {error or ended['how']}"
    written = next(iter(sorted((run_dir / "logs").glob(f"*-{job.number}.log"))), None)
    lines = [] if written is None else LAST_START.sub("", _text(written)).splitlines()
    return next((line for line in lines if re.search(r"error|cannot|given up", line, re.IGNORECASE)), "")


def _last_error(path: Path) -> str:
    """The last `nuteprune: …` line or exception of a log: a rank that ends says why last."""
    text = _text(path)
    lines = [line.strip() for line in text.splitlines() if line.startswith("nuteprune: ") or RAISED.fullmatch(line)]
    return lines[-1] if lines else ""


def _first_of(logs: Iterable[Path]) -> str:
    """The error of torchrun's rank that fell silent first, of those that tell of one."""
    ordered = sorted(logs, key=lambda path: path.stat().st_mtime)
    return next(filter(None, map(_last_error, ordered)), "")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _output(*command: str) -> str:
    """What a command prints, empty where it is not installed, fails or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
