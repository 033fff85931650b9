"""What a run tells while it goes: TensorBoard events, metrics.jsonl and a progress bar, from the main rank only."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summary
from tqdm import tqdm

from nuteprune.config import ConfigError, TrackingConfig

LOW = torch.tensor([0.13, 0.11, 0.30])
HIGH = torch.tensor([0.99, 0.85, 0.25])
"""Colours of 0 (removed) and 1 (kept) in the pictures."""
PICTURE_WIDTH = 768
PICTURE_HEIGHT = 384
"""Pixels a picture has at least, by repeating cells; wider pictures are averaged to `MAX_COLUMNS`."""
MAX_COLUMNS = 2048


class Tracker:
    """Writes scalars, pictures and texts of one stage below a run directory and shows its progress.

    Args:
        run_dir: gets `tensorboard/` and `metrics.jsonl`, of lines `{"step": s, "total": n, "stage/name": value, …}`.
        config: what to write and how often.
        total_steps: length of the progress bar.
        first_step: first step of this process; what an earlier one wrote of this stage from there on is dropped, in
            TensorBoard of every stage: a stage in training has a directory of its own. None: a stage without steps,
            which adds to the directory of another.
        is_main: whether this is rank 0; elsewhere every method does nothing.
        stage: prefix of the scalars' names.
        config_text: resolved configuration, kept as text in TensorBoard; empty: none.

    Raises:
        ConfigError: the run directory cannot be written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: TrackingConfig,
        total_steps: int,
        first_step: int | None = 0,
        is_main: bool = True,
        stage: str = "prune",
        config_text: str = "",
    ) -> None:
        self.stage = stage
        self.log_every = config.log_every
        self.last_step = total_steps - 1
        self._metrics = self._writer = self._bar = None
        if not is_main:
            return
        run_dir = Path(run_dir)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            path = run_dir / "metrics.jsonl"
            _drop_lines(path, stage, first_step or 0)
            self._metrics = path.open("a", encoding="utf-8")
            if config.tensorboard:
                self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=first_step, flush_secs=20)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"cannot write the run directory {run_dir} ({error.strerror}): set run_dir to another place"
            ) from error
        if config_text:
            self.text("config", f"```yaml\n{config_text}\n```")
        if config.progress:
            self._bar = tqdm(
                total=total_steps,
                initial=first_step or 0,
                desc=stage,
                unit="step",
                dynamic_ncols=True,
                # A log file wants a line now and then, a terminal a living bar.
                mininterval=0.5 if sys.stderr.isatty() else 10,
            )

    def log(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write `stage/name` scalars every `log_every` steps and at the last; JSONL has null for NaN and infinity."""
        if self._metrics is None or (step % self.log_every and step != self.last_step):
            return
        values = {f"{self.stage}/{name}": float(value) for name, value in scalars.items()}
        line: dict[str, float | None] = {"step": step, "total": self.last_step + 1}
        line |= {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise ConfigError(
                f"cannot write {self._metrics.name}: {error.strerror}; free space and start again"
            ) from None
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def progress(self, step: int, fields: Mapping[str, Any]) -> None:
        """Show that a step, counted from 0, is done, with fields such as `loss` and `sparsity` behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix(fields, refresh=False)
            self._bar.update(step + 1 - self._bar.n)

    def images(self, step: int, gates: Mapping[str, torch.Tensor]) -> None:
        """Draw gates `[L, U]` in 0..1 as heat maps, a row a layer, a column a unit."""
        if self._writer is not None:
            for name, values in gates.items():
                self._writer.add_image(f"{self.stage}/{name}", heat_map(values), step)

    def text(self, tag: str, text: str) -> None:
        """Write a text (Markdown) to TensorBoard."""
        if self._writer is not None:
            self._writer.add_text(f"{self.stage}/{tag}", text)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write flat hyperparameters and the final metrics to TensorBoard's HPARAMS page.

        Args:
            values: e.g. `{"train.steps": 100}`; what is no number, bool or text is written as text.
            metrics: final numbers by name, written as the scalars `hparam/name`.
        """
        if self._writer is None:
            return
        plain = {key: value if isinstance(value, bool | int | float | str) else str(value)
                 for key, value in values.items()}  # fmt: skip
        finals = {f"hparam/{name}": float(value) for name, value in metrics.items()}
        for summary in hparams_summary(plain, finals):
            self._writer.file_writer.add_summary(summary)
        for tag, value in finals.items():
            self._writer.add_scalar(tag, value)

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        for item in (self._bar, self._writer, self._metrics):
            if item is not None:
                item.close()
        self._metrics = self._writer = self._bar = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def heat_map(values: torch.Tensor) -> torch.Tensor:
    """Values `[L, U]` in 0..1 as a colour picture `[3, height, width]` with cells large enough to be seen."""
    cells = values.detach().float().cpu().clamp(0, 1)
    if cells.shape[1] > MAX_COLUMNS:
        cells = F.adaptive_avg_pool1d(cells[None], MAX_COLUMNS)[0]
    rows, columns = cells.shape
    cells = cells.repeat_interleave(-(-PICTURE_HEIGHT // rows), dim=0)
    cells = cells.repeat_interleave(-(-PICTURE_WIDTH // columns), dim=1)
    return LOW[:, None, None] * (1 - cells) + HIGH[:, None, None] * cells


def _drop_lines(path: Path, stage: str, first_step: int) -> None:
    """Take the lines of a stage from `first_step` on out of metrics.jsonl, and what a crash left half written."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _is_kept(line, stage, first_step)]
    if kept != lines:
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        os.replace(fresh, path)


def _is_kept(line: str, stage: str, first_step: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return entry["step"] < first_step or not any(key.startswith(f"{stage}/") for key in entry)
