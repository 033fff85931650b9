"""What a run tells while it goes, from the main rank only: metrics.jsonl, TensorBoard, wandb, trackio, progress bars.

wandb and trackio share one interface (`init`, `log`, `finish`, `Image`); both are used only where they are installed.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm as plain_tqdm
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from nuteprune.config import Config, TrackingConfig, flatten, to_dict
from nuteprune.errors import MachineError, UserError, first_line
from nuteprune.model.losses import TERMS
from nuteprune.runs.checkpoint import write_atomic
from nuteprune.runs.log import no_bar

log = logging.getLogger(__name__)

LINE = "{desc}: {unit} {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"
"""Of a progress bar in a log."""
CHARTS = {
    "loss": ("loss", *(f"{name}_loss" for name in TERMS)),
    "sparsity": ("expected_sparsity", "target_sparsity", "teacher_sparsity"),
    "tokens per second": ("tokens_per_s",),
    "peak memory (GB)": ("peak_memory_gb",),
}
"""What one watches, by chart of TensorBoard's page of custom scalars; all else is in a group of its own."""
WATCHED = {name for names in CHARTS.values() for name in names}
PICTURE_WIDTH = 4.5
"""Inches: TensorBoard shows pictures about 350 pixels wide, and labels must be read there."""


def watch_command(run_dir: Path) -> str:
    """The command that shows a run's curves, and the page to open."""
    command = Path(sys.executable).with_name("tensorboard")
    return f"{command} --logdir {run_dir / 'tensorboard'}, then http://localhost:6006/#custom_scalars"


def check_reporters(config: TrackingConfig) -> None:
    """Raise `UserError` where `tracking.report_to` names a package that is not installed."""
    missing = [name for name in config.report_to if find_spec(name) is None]
    if missing:
        raise UserError(
            f"tracking.report_to: {' and '.join(missing)} not installed: pip install {' '.join(missing)}, "
            "or name another"
        )


class Tracker:
    """Writes scalars, pictures and texts of one stage below the run directory and to `tracking.report_to`.

    Args:
        config: the run's settings; `run_dir` gets `tensorboard/` and `metrics.jsonl`, of lines
            `{"step": s, "total": n, "stage/name": value, …}`.
        stage: prefix of the scalars' names.
        total_steps: steps of the stage.
        first_step: first step of this process; what an earlier one wrote of this stage from there on is dropped, in
            TensorBoard of every stage: a stage in training has a directory of its own. None: a stage without steps,
            which adds to the directory of another.
        is_main: whether this is rank 0; elsewhere every method does nothing.

    Raises:
        UserError: the run directory cannot be written, or wandb or trackio does not start.
    """

    def __init__(
        self, config: Config, stage: str, total_steps: int, first_step: int | None = 0, is_main: bool = True
    ) -> None:
        self.config, self.stage, self.last_step = config, stage, total_steps - 1
        self._metrics = self._writer = None
        self._modules: list[Any] = []
        self._described = first_step is None
        """Whether charts and settings stand in TensorBoard; they are written with the first scalars."""
        if not is_main:
            return
        run_dir, names = Path(config.run_dir), config.tracking.report_to
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            path = run_dir / "metrics.jsonl"
            if path.is_symlink():
                raise UserError(f"{path} is a symbolic link, which is not written through: put a file there")
            if first_step is not None:  # a stage that may run beside one in training only adds lines
                _drop_lines(path, stage, first_step)
            self._metrics = path.open("a", encoding="utf-8")
            if "tensorboard" in names:
                log.info("curves: %s", watch_command(run_dir))
                self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=first_step, flush_secs=20)
        except OSError as error:
            self.close()
            raise MachineError(
                f"cannot write the run directory {run_dir} ({error.strerror}): set run_dir to another place"
            ) from error
        self._modules = [_start(name, config) for name in names if name != "tensorboard"]

    def log(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write a step's scalars as `stage/name`; JSONL has null for NaN and infinity."""
        if self._metrics is None:
            return
        values = {f"{self.stage}/{name}": float(value) for name, value in scalars.items()}
        self._write_line(step, values)
        shown = {tag if tag.split("/")[1] in WATCHED else tag.replace("/", "_details/"): value
                 for tag, value in values.items()}  # fmt: skip
        if self._writer is not None:
            if not self._described:
                self._describe(shown)
            for tag, value in shown.items():
                self._writer.add_scalar(tag, value, step)
        for module in self._modules:
            module.log(shown, step=step)

    def picture(self, step: int, gates: Mapping[str, Tensor]) -> None:
        """Draw what each layer keeps from gates [L, U] in 0..1 by kind, where a picture is shown at all."""
        if not gates or not (self._writer or self._modules):
            return
        from nuteprune.training.pictures import kept_picture  # matplotlib takes half a second, and one rank draws

        image = Image.open(io.BytesIO(kept_picture(gates, PICTURE_WIDTH))).convert("RGB")
        tag = f"{self.stage}/kept"
        if self._writer is not None:
            self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")
        for module in self._modules:
            module.log({tag: module.Image(image)}, step=step)

    def table(self, name: str, text: str, scalars: Mapping[str, Any]) -> None:
        """Write a result that has no steps: as text (Markdown) to TensorBoard, as numbers to the others."""
        if self._metrics is None:
            return
        values = {f"{self.stage}/{key}": float(value) for key, value in scalars.items()}
        self._write_line(0, values)
        if self._writer is not None:
            self._writer.add_text(f"{self.stage}/{name}", text)
        for module in self._modules:
            module.log(values)

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        for item in (self._writer, self._metrics):
            if item is not None:
                item.close()
        for module in self._modules:
            module.finish()
        self._metrics = self._writer = None
        self._modules = []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_line(self, step: int, values: Mapping[str, float]) -> None:
        assert self._metrics is not None
        line: dict[str, float | None] = {"step": step, "total": self.last_step + 1}
        line |= {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise MachineError(
                f"cannot write {self._metrics.name}: {error.strerror}; free space and start again"
            ) from None

    def _describe(self, values: Mapping[str, float]) -> None:
        """Lay out the page of custom scalars, and write the settings as text and for the HPARAMS page."""
        assert self._writer is not None
        charts = {title: [f"{self.stage}/{name}" for name in names if f"{self.stage}/{name}" in values]
                  for title, names in CHARTS.items()}  # fmt: skip
        # The tags are regular expressions that match from the start.
        layout = {title: ["Multiline", [f"{tag}$" for tag in tags]] for title, tags in charts.items() if tags}
        self._writer.add_custom_scalars({self.stage: layout})
        text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
        self._writer.add_text(f"{self.stage}/config", f"```yaml\n{text}\n```")
        watched = dict.fromkeys(charts["loss"][:1] + charts["sparsity"][:1])
        for summary in hparams(_plain(self.config), watched):
            self._writer.file_writer.add_summary(summary)
        self._described = True


@contextmanager
def progress_bar(name: str, unit: str, total: int, done: int = 0, shown: bool = True) -> Iterator[plain_tqdm]:
    """A bar in a terminal or a notebook, with log lines above it, else a line of the log each half a minute; it counts
    from now on, and is a dummy unless `shown`."""
    counted: dict[str, Any] = {"total": total, "initial": done, "desc": name, "unit": unit, "disable": not shown}
    if no_bar(shown):
        with plain_tqdm(**counted, mininterval=30, maxinterval=60, file=_Lines(), bar_format=LINE) as bar:
            yield bar
        return
    with logging_redirect_tqdm(), tqdm(**counted, mininterval=0.5, dynamic_ncols=True) as bar:
        yield bar


class _Lines(io.TextIOBase):
    """A file for a bar, each state of which becomes a line of the log."""

    def write(self, text: str) -> int:
        if text.strip():
            log.info("%s", text.strip())
        return len(text)


def _start(name: str, config: Config) -> Any:
    """The module wandb or trackio with a run started, which goes on where one of this directory exists."""
    module = importlib.import_module(name)
    run_dir = Path(config.run_dir).resolve()
    label = "-".join(run_dir.parts[-2:]).strip("/-")
    own = {"id": label, "dir": str(run_dir)} if name == "wandb" else {}
    project = os.environ.get(f"{name.upper()}_PROJECT", "nuteprune")
    try:
        module.init(project=project, name=label, config=_plain(config), resume="allow", **own)
    except Exception as error:  # of any kind: no login, no network, no space
        raise UserError(f"tracking.report_to: {name} does not start: {first_line(error)}") from error
    return module


def _plain(config: Config) -> dict[str, bool | int | float | str]:
    """Flat settings, lists as text."""
    flat = flatten(to_dict(config))
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in flat.items()}


def _drop_lines(path: Path, stage: str, first_step: int) -> None:
    """Take the lines of a stage from `first_step` on out of metrics.jsonl, and what a crash left half written."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _is_kept(line, stage, first_step)]
    if kept != lines:
        write_atomic(path, "".join(kept).encode())


def _is_kept(line: str, stage: str, first_step: int) -> bool:
    try:
        entry = json.loads(line)
        step = int(entry["step"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
    return step < first_step or not any(key.startswith(f"{stage}/") for key in entry)
