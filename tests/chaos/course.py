"""What is disturbed: the stages from pruning to the ladder on a tiny model, each with its undisturbed result.

Everything runs in one directory, `live`, so that paths in results are alike; a state is a copy of it.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import ranks
from faults import MOMENTS, Disturbance, Tally
from tiny import SENTENCES, tiny_model, tiny_tokenizer

TIMED = ("step_s", "tokens_per_s", "peak_memory_gb")
"""What no two runs share."""
HALVES = (0.5, 0.9)
"""Where cached states were cut, as shares of a stage's file operations."""
HANG = 400
"""Seconds after which a start counts as hung."""


@dataclass(frozen=True)
class Stage:
    """A stage on a number of ranks.

    Attributes:
        name: of the stage.
        ranks: how many.
        command: its command line.
        result: its result's directory, below the run directory.
        metrics: its metrics.jsonl, empty for none.
    """

    name: str
    ranks: int
    command: tuple[str, ...]
    result: str
    metrics: str = ""

    @property
    def key(self) -> str:
        """Name for directories and tables."""
        return f"{self.name}-{self.ranks}" if self.metrics else self.name


@dataclass
class Ended:
    """How a start ended: exit codes by rank, the output of all, seconds, and whether a disturbance struck before."""

    codes: list[int]
    text: str
    seconds: float
    struck: bool = False

    @property
    def lines(self) -> list[str]:
        """The program's own words on why it ended."""
        return [line for line in self.text.splitlines() if line.startswith("nuteprune: ")]


class Course:
    """The stages, their undisturbed results, and the directory they run in.

    Args:
        work: directory for everything.
        wanted: keys of the stages that are disturbed.
        part: name of this campaign's part, where several run at once.
    """

    def __init__(self, work: Path, wanted: list[str], part: str):
        self.work, self.live, self.logs = work, work / "live", work / f"logs{part}"
        self.run_dir, self.marker = self.live / "run", self.logs / "struck"
        self.stages = {s.key: s for s in self._stages() if s.key in wanted}
        self.counts: dict[str, dict[str, int]] = {}
        """Moments of an undisturbed start, by stage and `where`; its seconds under `seconds`."""

    def _stages(self) -> list[Stage]:
        live, run = str(self.live), str(self.run_dir)
        # No pictures: drawing them takes longer than the steps.
        shared = ("tracking.progress=false", "tracking.report_to=[]", "train.rank_timeout=60", "checkpoint.every=3")
        prune = (
            "prune", f"run_dir={run}", f"model.path={live}/model", f"data.source={live}/text.txt", "data.seq_len=32",
            "train.steps=12", "train.batch_size=4", "gates.importance_tokens=1", "sparsity.target=0.3",
            "gates.ffn_multiple=1", "gates.hidden_multiple=1", *shared,
        )  # fmt: skip
        tune = (
            "finetune", run, f"finetune.data={live}/records.json", "finetune.seq_len=64", "finetune.batch_size=4",
            "finetune.steps=9", "finetune.lr=1e-3", "finetune.distill=0.5", *shared,
        )  # fmt: skip
        export = ("export", run, "export.source=pruned")
        ladder = (
            "export", run, "--ladder=0.1,0.2", f"evaluate.text=[{live}/heldout.txt]",
            "evaluate.window=32", "evaluate.blocks=4", "evaluate.batch_sizes=[]", "evaluate.prompts=0",
            "tracking.progress=false", "tracking.report_to=[]",
        )  # fmt: skip
        found = [Stage("prune", n, prune, "pruned", "metrics.jsonl") for n in (1, 2, 4)]
        found += [Stage("finetune", n, tune, "finetune/tuned", "finetune/metrics.jsonl") for n in (1, 2, 4)]
        distill = ("distill", run, "distill.steps=9", *shared)
        found += [Stage("export", 1, export, "export")]
        found += [Stage("distill", n, distill, "distill/model", "distill/metrics.jsonl") for n in (1, 2)]
        return [*found, Stage("ladder", 1, ladder, "ladder")]

    def prepare(self) -> bool:
        """Make the inputs, the undisturbed results and the states that faults start from; returns whether any were.

        What is there is kept.
        """
        file, made = self.work / "counts.json", False
        if file.is_file():
            self.counts = json.loads(file.read_text())
        if not (self.work / "inputs").is_dir():
            self._inputs(self.work / "inputs.new", seed=0)
            self._inputs(self.work / "others", seed=1)
            (self.work / "inputs.new").rename(self.work / "inputs")
        stages = {stage.key: stage for stage in self._stages()}
        first = stages["prune-1"]
        before = [stages["export"]] if any(stage.name == "distill" for stage in self.stages.values()) else []
        for stage in [first, *before, *self.stages.values()]:
            if stage.key not in self.counts:
                if stage == first:
                    self._other_run(stage)
                self._reference(stage)
                self._halves(stage)
                file.write_text(json.dumps(self.counts))
                made = True
        return made

    def _inputs(self, directory: Path, seed: int) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        tiny_model("llama", seed=seed).save_pretrained(directory / "model")
        tiny_tokenizer().save_pretrained(directory / "model")
        (directory / "text.txt").write_text("\n".join((SENTENCES * 3)[seed:]), encoding="utf-8")
        (directory / "heldout.txt").write_text("\n".join(reversed(SENTENCES)), encoding="utf-8")
        rows = [{"prompt": f"The {n + seed}", "completion": " river" * (1 + n % 7)} for n in range(40)]
        (directory / "records.json").write_text(json.dumps(rows))

    def _reference(self, stage: Stage) -> None:
        self.restore(self.start_of(stage))
        ended = self.start(stage, Tally(str(self.run_dir), str(self.logs / "tally")))
        assert ended.codes == [0] * stage.ranks, ended.text
        counts = {where: (self.logs / f"tally-{where}").stat().st_size for where in MOMENTS}
        counts["seconds"] = round(ended.seconds, 2)
        self._keep(self.work / "reference" / stage.key)
        self.counts[stage.key] = counts

    def _other_run(self, stage: Stage) -> None:
        """A run with another seed beside the other inputs, to swap files with."""
        self.restore(self.start_of(stage))
        ended = self.start(replace(stage, command=(*stage.command, "seed=1", "checkpoint.keep=9")))
        assert ended.codes == [0], ended.text
        shutil.copytree(self.run_dir, self.work / "others" / "run", dirs_exist_ok=True)

    def _halves(self, stage: Stage) -> None:
        for number, share in enumerate(HALVES):
            self.restore(self.start_of(stage))
            at = max(1, int(share * self.counts[stage.key]["file"]))
            ended = self.start(stage, self.disturbance("kill", at, 0, "file"))
            assert ended.codes[0] == -signal.SIGKILL, ended.text
            self._keep(self.work / "states" / f"{stage.key}-{number}")

    def _keep(self, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.live, target)

    def start_of(self, stage: Stage) -> Path:
        """The state before a stage: the inputs, and the pruned student or its export where the stage wants one."""
        before = {"prune": "inputs", "distill": "reference/export"}
        return self.work / before.get(stage.name, "reference/prune-1")

    def half(self, stage: Stage, number: int) -> Path:
        """A state in the middle of a stage."""
        return self.work / "states" / f"{stage.key}-{number}"

    def reference(self, stage: Stage) -> Path:
        """The state after a stage."""
        return self.work / "reference" / stage.key

    def restore(self, state: Path) -> None:
        """Make a state the live one; the directory itself stays, for something may be mounted there."""
        self.live.mkdir(parents=True, exist_ok=True)
        for path in self.live.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(state, self.live, dirs_exist_ok=True)

    def disturbance(self, act: str, at: int, rank: int, where: str) -> Disturbance:
        """A disturbance of a stage's run directory."""
        return Disturbance(act, at, rank, where, str(self.run_dir), str(self.marker))

    def start(self, stage: Stage, disturbance: Disturbance | Tally | None = None, outside=None) -> Ended:
        """Start a stage and wait for its end.

        Args:
            stage: what is started.
            disturbance: of one rank from within.
            outside: (seconds, rank or None for all, signal) from without; ranks that were stopped are killed when the
                others have ended, as a launcher does.
        """
        self.logs.mkdir(exist_ok=True)
        self.marker.unlink(missing_ok=True)
        from_within, began = outside is None, time.monotonic()
        group = ranks.Group(list(stage.command), stage.ranks, self.logs, disturbance)
        until = began + HANG
        while (alive := [p for p in group.processes if p.is_alive()]) and time.monotonic() < until:
            if outside and time.monotonic() - began >= outside[0]:
                for rank, process in enumerate(group.processes):
                    if outside[1] in (None, rank) and process.is_alive():
                        group.signal(rank, outside[2])
                outside = None
            if all(_is_stopped(process.pid) for process in alive):
                break
            time.sleep(0.01)
        hung = [process.pid for process in alive if not _is_stopped(process.pid)]
        for process in group.processes:
            process.kill()
            process.join()
        texts = [log.read_text(errors="replace") if log.is_file() else "" for log in group.logs]
        text = "\n".join(texts) + (f"\nranks hang: {len(hung)}" if hung else "")
        struck = self.marker.exists() if from_within else outside is None
        return Ended([process.exitcode for process in group.processes], text, time.monotonic() - began, struck)

    def difference(self, stage: Stage, with_metrics: bool = True) -> str:
        """The first file of the result that is not the undisturbed one's, bit for bit; empty where there is none."""
        wanted = self.reference(stage) / "run"
        for name in _files(wanted / stage.result) | _files(self.run_dir / stage.result):
            if name.startswith("evaluate/"):  # it has the date in it
                continue
            pair = [root / stage.result / name for root in (wanted, self.run_dir)]
            if not all(p.is_file() for p in pair) or pair[0].read_bytes() != pair[1].read_bytes():
                return f"{stage.result}/{name}"
        if stage.metrics and with_metrics:
            curves = [_metrics(root / stage.metrics) for root in (wanted, self.run_dir)]
            return stage.metrics if curves[0] != curves[1] else ""
        return ""


def _files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def _metrics(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{k: v for k, v in line.items() if not k.endswith(TIMED)} for line in lines]


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
