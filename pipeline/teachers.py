"""Numerous teachers: the student's own earlier gates and LoRA, kept in host memory over one shared base model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.arch import ArchSpec
from pipeline.config import TeacherConfig
from pipeline.layers import LoraWeights, View, build_view
from pipeline.masks import Gates

_GRID_EPS = 1e-6
"""Slack on the interval grid: 0.29 / 0.01 is 28.999… in binary."""


@dataclass(frozen=True)
class Snapshot:
    """One recorded teacher.

    Attributes:
        step: optimizer step after which it was taken.
        sparsity: expected sparsity at that moment.
        gates: deterministic gates, float32.
        scores: log-alpha by kind, float32: the order in which units leave, for export.
        lora: LoRA pairs in bfloat16.
    """

    step: int
    sparsity: float
    gates: Gates
    scores: dict[str, Tensor]
    lora: dict[str, tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        """Host memory of the snapshot in bytes."""
        tensors = [
            *self.gates.as_dict().values(),
            *self.scores.values(),
            *(t for pair in self.lora.values() for t in pair),
        ]
        return sum(t.nbytes for t in tensors)


class TeacherBank:
    """Records snapshots as sparsity rises and says which of them teaches a step (paper, section 3.3).

    While the sparsity rises the teacher is the sparsest snapshot at least `lag` intervals below the student, the intact
    model before there is one. From the step the target is reached on, the remaining steps walk from the sparsest such
    snapshot back to the intact model in equal shares. `share` keeps out snapshots so sparse that, in a short run, they
    know too little to teach.

    Args:
        spec: the architecture.
        config: mode, interval, lag.
        scaling: LoRA alpha / rank.
        device, dtype: where and in what type teachers compute.
    """

    def __init__(self, spec: ArchSpec, config: TeacherConfig, scaling: float, device: torch.device, dtype: torch.dtype):
        self.spec, self.config, self.scaling = spec, config, scaling
        self.device, self.dtype = device, dtype
        self.snapshots: list[Snapshot] = []
        self._active: tuple[int | None, View] | None = None

    @property
    def nbytes(self) -> int:
        """Host memory of all snapshots in bytes."""
        return sum(s.nbytes for s in self.snapshots)

    def record(self, step: int, sparsity: float, gates: Gates, scores: dict[str, Tensor], lora: LoraWeights) -> bool:
        """Keep a snapshot if the sparsity passed another interval since the last one; returns whether it did."""
        last = self._interval(self.snapshots[-1].sparsity) if self.snapshots else 0
        if self._interval(sparsity) <= last:
            return False
        host = {k: tuple(t.detach().to("cpu", torch.bfloat16, copy=True) for t in pair) for k, pair in lora.items()}
        scores = {k: s.detach().to("cpu", torch.float32, copy=True) for k, s in scores.items()}
        gates = gates.detach().to("cpu", torch.float32, copy=True)
        self.snapshots.append(Snapshot(step, sparsity, gates, scores, host))
        return True

    def choose(self, student_sparsity: float, step: int, reached: int, total: int) -> int | None:
        """Index of the snapshot that teaches `step`, None for the intact model.

        Args:
            student_sparsity: expected sparsity of the student now.
            step: this step; `reached`: first step at the full target; `total`: steps of the run.
        """
        if self.config.mode != "numerous":
            return None
        behind = student_sparsity - self.config.lag * self.config.interval
        limit = min(behind, self.config.share * student_sparsity)
        usable = [i for i, s in enumerate(self.snapshots) if s.sparsity <= limit + self.config.interval * _GRID_EPS]
        if step < reached:
            return usable[-1] if usable else None
        walk = [*reversed(usable), None]
        return walk[min(len(walk) - 1, (step - reached) * len(walk) // max(1, total - reached))]

    def activate(self, index: int | None) -> View:
        """The view of a snapshot (None: the intact model); moved and converted only when the teacher changes."""
        if self._active is None or self._active[0] != index:
            self._active = (index, self._view(index))
        return self._active[1]

    def _view(self, index: int | None) -> View:
        if index is None:
            return build_view(self.spec, None, {}, self.scaling, self.dtype, "intact")
        snapshot = self.snapshots[index]
        lora = {k: tuple(t.to(self.device) for t in pair) for k, pair in snapshot.lora.items()}
        label = f"{snapshot.sparsity:.1%}"
        return build_view(self.spec, snapshot.gates.to(self.device), lora, self.scaling, self.dtype, label)

    def _interval(self, sparsity: float) -> int:
        return int(sparsity / self.config.interval + _GRID_EPS)
