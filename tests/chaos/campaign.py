"""Campaigns of faults against the real stages on a tiny model: `make chaos`, or with --short what the tests run.

Each trial starts from a cached state, suffers one fault, and is started again by the same command. It is recovered
where the result is that of an undisturbed run bit for bit, or where one clear line says why there is none. A fault that
comes after the stage's end is drawn anew, and not counted if it comes too late again and again. Trials are chosen by
the seed; what is in WORK/results-*.jsonl is not tried again, so a campaign that was cut short goes on.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from course import HALVES, Course, Ended, Stage
from faults import damage, mount, unmount

SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}
FILES = ("truncated file", "altered file", "swapped file", "missing file")
MOUNTS = ("full disk", "read-only directory")
FAULTS = (
    *SIGNALS, "kill -9 while saving", "SIGTERM while saving", *MOUNTS, *FILES, "clock jumps back", "hanging rank",
    "rank dies in a collective",
)  # fmt: skip
"""Rows of the table."""
VERDICTS = ("identical", "clear line", "FAILED")
STAGES = (
    "prune-1", "prune-2", "prune-4", "finetune-1", "finetune-2", "finetune-4", "export", "distill-1", "distill-2",
    "ladder",
)  # fmt: skip
MISSED = "too late"
"""Verdict where no fault struck; not counted."""
DRAWS = 6
"""Times that a fault is drawn until it strikes."""
SHORT = ("prune-1", "prune-2", "export")
"""Stages of the short form, which leaves out `hanging rank` too: that one waits for the time-out."""
PAGE = 4096


@dataclass
class Trial:
    """One fault and what became of it.

    Attributes:
        number: in the campaign.
        stage, fault: where and what.
        what: the fault in particulars.
        verdict: one of `VERDICTS`, or `MISSED`.
        line: the clear line, or what failed.
        seconds: of the disturbed starts and the second start.
    """

    number: int
    stage: str
    fault: str
    what: str = ""
    verdict: str = ""
    line: str = ""
    seconds: float = 0.0


def applies(fault: str, stage: str) -> bool:
    """Whether a stage can suffer a fault."""
    return stage[-1] in "24" if fault in ("hanging rank", "rank dies in a collective") else True


def plan(stages: tuple[str, ...], faults: tuple[str, ...], count: int, seed: int) -> list[Trial]:
    """Every fault against every stage in turn, in an order of the seed, until there are enough."""
    rng, trials = random.Random(seed), []
    while len(trials) < count:
        pairs = [(stage, fault) for fault in faults for stage in stages if applies(fault, stage)]
        rng.shuffle(pairs)
        trials += [Trial(len(trials) + n, stage, fault) for n, (stage, fault) in enumerate(pairs)]
    return trials[:count]


class Campaign:
    """Trials against a course.

    Args:
        course: the stages and their states.
        seed: of every choice.
    """

    def __init__(self, course: Course, seed: int):
        self.course, self.seed = course, seed

    def run(self, trial: Trial) -> Trial:
        """Try one fault; fills in what happened."""
        course, stage = self.course, self.course.stages[trial.stage]
        rng = random.Random(f"{self.seed}-{trial.number}")
        began = time.monotonic()
        for _ in range(DRAWS):
            try:
                disturbed = self.disturb(trial, stage, rng)
                again = course.start(stage)
            finally:
                if trial.fault == "read-only directory":
                    unmount(course.run_dir)
            trial.verdict, trial.line = self.judge(trial, stage, disturbed, again)
            if trial.verdict == "FAILED":
                self.keep(trial, disturbed, again)
            if trial.fault in MOUNTS:
                unmount(course.live)
            if trial.verdict != MISSED:
                break
        trial.seconds = round(time.monotonic() - began, 1)
        return trial

    def disturb(self, trial: Trial, stage: Stage, rng: random.Random) -> Ended | None:
        """Bring about the fault; returns how the disturbed start ended, None where files were damaged between two."""
        fault = trial.fault
        if fault in FILES:
            return self.damage(trial, stage, rng)
        if fault in MOUNTS:
            return self.mounted(trial, stage, rng)
        self.course.restore(self.some_state(trial, stage, rng))
        counts = self.course.counts[stage.key]
        if fault in SIGNALS and rng.random() < 0.7:
            delay, rank = rng.uniform(0, counts["seconds"]), rng.choice([None, *range(stage.ranks)])
            trial.what += f", after {delay:.2f} s, {'all ranks' if rank is None else f'rank {rank}'}"
            return self.course.start(stage, outside=(delay, rank, SIGNALS[fault]))
        if fault == "hanging rank" and rng.random() < 0.5:
            delay, rank = rng.uniform(0.3, 0.9) * counts["seconds"], rng.randrange(stage.ranks)
            trial.what += f", after {delay:.2f} s, rank {rank}"
            return self.course.start(stage, outside=(delay, rank, signal.SIGSTOP))
        acts = {"kill -9": "kill", "SIGTERM": "term", "SIGUSR1": "usr1", "clock jumps back": "clock",
                "hanging rank": "stop", "rank dies in a collective": "kill"}  # fmt: skip
        where = "save" if "saving" in fault else "collective" if acts.get(fault) and "rank" in fault else "file"
        return self.within(trial, stage, acts[fault.removesuffix(" while saving")], where, rng)

    def within(self, trial: Trial, stage: Stage, act: str, where: str, rng: random.Random) -> Ended:
        """A disturbance at a counted moment of one rank."""
        rank = rng.randrange(stage.ranks) if where == "collective" else 0
        at = rng.randint(1, max(1, self.course.counts[stage.key][where]))
        trial.what += f", {where} operation {at} of rank {rank}"
        return self.course.start(stage, self.course.disturbance(act, at, rank, where))

    def some_state(self, trial: Trial, stage: Stage, rng: random.Random) -> Path:
        """A state that a start finds: the stage's beginning, or one left by a kill."""
        number = rng.randrange(-1, len(HALVES))
        trial.what = "from the start" if number < 0 else f"resumed at {HALVES[number]:.0%}"
        return self.course.start_of(stage) if number < 0 else self.course.half(stage, number)

    def damage(self, trial: Trial, stage: Stage, rng: random.Random) -> None:
        """Damage a file of a run that was cut, of a finished one, or of what the stage reads."""
        course, kind = self.course, trial.fault.split()[0]
        number = rng.randrange(len(HALVES) + 1)
        finished = number == len(HALVES)
        course.restore(course.reference(stage) if finished else course.half(stage, number))
        files = sorted(p for p in course.run_dir.rglob("*") if p.is_file() and p.stat().st_size)
        inputs = [course.live / "text.txt"] if stage.name == "prune" else []
        if kind != "altered":  # of the base model's weights only samples are looked at: a single bit may go unseen
            inputs.append(course.live / "model" / "model.safetensors")
        file = rng.choice(inputs) if inputs and rng.random() < 0.2 else rng.choice(files)
        state = "finished" if finished else f"cut at {HALVES[number]:.0%}"
        trial.what = f"{state}, {damage(kind, file, files, course.live, course.work / 'others', rng)}"

    def mounted(self, trial: Trial, stage: Stage, rng: random.Random) -> Ended:
        """A full disk, or a directory that cannot be written from the start or from a moment on."""
        course = self.course
        state = self.some_state(trial, stage, rng)
        grows = pages(course.reference(stage)) - pages(state)
        mount("-t", "tmpfs", "-o", "size=256m", "tmpfs", str(course.live))
        course.restore(state)
        if trial.fault == "full disk":
            disk, free = os.statvfs(course.live), rng.randint(1, max(2, grows))
            mount("-o", f"remount,size={(disk.f_blocks - disk.f_bfree + free) * PAGE}", str(course.live))
            trial.what += f", {free * PAGE // 1024} KB free"
            ended = course.start(stage)
            mount("-o", "remount,size=256m", str(course.live))
            return replace(ended, struck=any(ended.codes))
        if rng.random() < 0.4:
            trial.what += ", from the start on"
            mount("-o", "remount,ro", str(course.live))
            ended = course.start(stage)
            mount("-o", "remount,rw", str(course.live))
            return replace(ended, struck=True)
        course.run_dir.mkdir(exist_ok=True)
        ended = self.within(trial, stage, "freeze", "file", rng)
        unmount(course.run_dir)
        return ended

    def judge(self, trial: Trial, stage: Stage, disturbed: Ended | None, again: Ended) -> tuple[str, str]:
        """The verdict, and the line that explains it."""
        course = self.course
        for name, ended in (("disturbed", disturbed), ("second", again)):
            if ended and "Traceback (most recent call last)" in ended.text:
                return "FAILED", f"a traceback of the {name} start: {ended.text.strip().splitlines()[-1][:200]}"
            if ended and "ranks hang" in ended.text:
                return "FAILED", f"the {name} start hangs"
        if disturbed and any(code not in (0, 2, 75, -9, -10, -15) for code in disturbed.codes):
            return "FAILED", f"exit codes {disturbed.codes} of the disturbed start"
        if disturbed and 2 in disturbed.codes and len(disturbed.lines) != 1:
            return "FAILED", f"the disturbed start said {len(disturbed.lines)} lines instead of one"
        if all(code == 0 for code in again.codes):
            damaged = trial.fault in FILES and "metrics.jsonl" in trial.what
            difference = course.difference(stage, with_metrics=not damaged)
            if difference:
                return "FAILED", f"differs in {difference}"
            if disturbed and not disturbed.struck:
                return MISSED, ""
            return "identical", disturbed.lines[-1] if disturbed and disturbed.lines else ""
        if set(again.codes) == {2} and len(again.lines) == 1:
            return "clear line", again.lines[0]
        return "FAILED", f"exit codes {again.codes} of the second start, {len(again.lines)} lines"

    def keep(self, trial: Trial, disturbed: Ended | None, again: Ended) -> None:
        """Keep what a failed trial left, to look into."""
        target = self.course.work / "failed" / f"{trial.number:04d}"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.course.live, target / "live", symlinks=True)
        (target / "trial.json").write_text(json.dumps(asdict(trial), indent=1))
        for name, ended in (("disturbed", disturbed), ("again", again)):
            if ended:
                (target / f"{name}.log").write_text(f"{ended.codes}\n{ended.text}")


def pages(directory: Path) -> int:
    """Memory pages that the files below a directory take in a tmpfs."""
    return sum(-(-path.stat().st_size // PAGE) for path in directory.rglob("*") if path.is_file())


def table(trials: list[Trial], stages: tuple[str, ...]) -> str:
    """Markdown: fault by stage, identical / clear line / FAILED of those tried, with totals."""
    counted = Counter((t.fault, t.stage, t.verdict) for t in trials)

    def cell(faults: tuple[str, ...], columns: tuple[str, ...]) -> str:
        numbers = [sum(counted[f, s, verdict] for f in faults for s in columns) for verdict in VERDICTS]
        return " / ".join(map(str, numbers)) if sum(numbers) else "–"

    rows = [f for f in FAULTS if any(t.fault == f for t in trials)]
    lines = ["| fault | tried | " + " | ".join(stages) + " | all |", "|---" * (len(stages) + 3) + "|"]
    for name, faults in [*((row, (row,)) for row in rows), ("**all**", tuple(rows))]:
        tried = sum(t.fault in faults for t in trials)
        cells = [cell(faults, (stage,)) for stage in stages]
        lines.append(f"| {name} | {tried} | {' | '.join(cells)} | {cell(faults, stages)} |")
    return "\n".join(lines)


def write_report(path: Path, trials: list[Trial], stages: tuple[str, ...], seed: int, skipped: tuple[str, ...]) -> None:
    """The campaign as Markdown."""
    clear = Counter(line_kind(t.line) for t in trials if t.verdict == "clear line")
    failed = [t for t in trials if t.verdict == "FAILED"]
    parts = [
        "# Faults, counted",
        f"`make chaos CHAOS_ARGS='--faults {len(trials)} --seed {seed}'`, {datetime.date.today()}, {machine()}, Python "
        f"{platform.python_version()}; {sum(t.seconds for t in trials) / 60:.0f} minutes of trials.",
        "Each trial is one fault against the real command on a tiny LLaMA (24 hidden dimensions, 3 layers), then the "
        "same command again. A cell counts: result bit-identical to the undisturbed one / one clear line says why "
        "there is none / FAILED. A stage's number is that of its ranks.",
        table(trials, stages),
    ]
    if skipped:
        parts.append(f"Not tried, for want of the right to mount: {', '.join(skipped)}.")
    if clear:
        parts += ["Clear lines, by kind:", "\n".join(f"- {count} × {kind}" for kind, count in clear.most_common())]
    if failed:
        parts += ["FAILED:", "\n".join(f"- {t.number}: {t.stage}, {t.fault} ({t.what}): {t.line}" for t in failed)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def line_kind(line: str) -> str:
    """A clear line without what differs from trial to trial."""
    words = [word for word in line.removeprefix("nuteprune: ").split() if "/" not in word and not word.isdigit()]
    return " ".join(words)[:110]


def machine() -> str:
    """The processor, and how many of it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name} ({os.cpu_count()} cores)"


def can_mount() -> bool:
    """Whether this process may mount; it moves into a mount namespace of its own first, which its end undoes."""
    if os.environ.get("CHAOS_MOUNTS"):
        return os.environ["CHAOS_MOUNTS"] == "yes"
    command = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    probe = [*command, "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
    works = shutil.which("unshare") and subprocess.run(probe, capture_output=True, check=False).returncode == 0
    os.environ["CHAOS_MOUNTS"] = "yes" if works else "no"
    if works:
        os.execvp("unshare", [*command, sys.executable, *sys.argv])
    return False


def main() -> int:
    """Run a campaign; returns 1 where a trial failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=220, help="trials (default 220)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/chaos"), help="directory of states and results")
    parser.add_argument("--report", type=Path, help="Markdown file (default: WORK/chaos.md)")
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}, and no hanging rank")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th trial from the I-th on, beside the other parts")
    parser.add_argument("--only", nargs="*", type=int, help="numbers of single trials, tried anew; none: report only")
    args = parser.parse_args()
    mounts = can_mount()
    args.work.mkdir(parents=True, exist_ok=True)
    stages = SHORT if args.short else STAGES
    skipped = () if mounts else MOUNTS
    number, parts = map(int, args.part.split("/"))
    course = Course(args.work.resolve(), list(stages), f"-{number}" if parts > 1 else "")
    if mounts:  # in memory, where flushing costs nothing; and each part sees its own in the same place
        course.live.mkdir(exist_ok=True)
        mount("-t", "tmpfs", "tmpfs", str(course.live))
    elif parts > 1:
        parser.error("--part needs the right to mount")
    with (args.work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = course.prepare()
    if made and not args.short:  # sets and dicts of strings come in another order in another process
        os.execv(sys.executable, [sys.executable, *sys.argv])
    left_out = (*skipped, "hanging rank") if args.short else skipped
    trials = plan(stages, tuple(f for f in FAULTS if f not in left_out), args.faults, args.seed)
    results = args.work / f"results-{number}-{parts}.jsonl"
    known = [Trial(**json.loads(line)) for file in args.work.glob("results-*.jsonl") for line in file.open()]
    done = {t.number: t for t in known if t.number not in (args.only or ())}
    campaign = Campaign(course, args.seed)
    for trial in trials:
        if trial.number in done or (args.only is not None and trial.number not in args.only):
            continue
        if trial.number % parts != number:
            continue
        done[trial.number] = campaign.run(trial)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
        print(f"{trial.number:4} {trial.stage:11} {trial.fault:26} {trial.verdict:10} {trial.seconds:5.1f} s  "
              f"{trial.what}  {trial.line}", flush=True)  # fmt: skip
    found = [done[t.number] for t in trials if t.number in done and done[t.number].verdict != MISSED]
    write_report(args.report or args.work / "chaos.md", found, stages, args.seed, skipped)
    print(table(found, stages))
    return int(any(t.verdict == "FAILED" for t in found))


if __name__ == "__main__":
    sys.exit(main())
