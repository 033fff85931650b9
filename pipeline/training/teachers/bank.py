"""The student's earlier gates and LoRA, kept in host memory over one shared base model, to teach with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import TeacherConfig
from nuteprune.masks import Gates
from nuteprune.model.layers import LoraWeights, View, build_view
from nuteprune.model.lora import joined, trimmed
from nuteprune.runs.snapshot import Pairs, Snapshot, nbytes
from nuteprune.runs.snapshot_files import write_rung

_GRID_EPS = 1e-6
"""Slack on the interval grid: 0.29 / 0.01 is 28.999… in binary."""


class SnapshotBank:
    """Records snapshots as sparsity rises, and gives the view of one of them or of the intact model.

    Args:
        spec: the architecture.
        config: `interval`, and what a policy reads.
        scaling: LoRA alpha / rank.
        device, dtype: where and in what type teachers compute.
        target: the sparsity that the student never passes.
        rungs: directory for the snapshots that cannot teach; without one they are not kept, only known of.
    """

    def __init__(
        self, spec: ArchSpec, config: TeacherConfig, scaling: float, device: torch.device, dtype: torch.dtype,
        target: float = 1.0, rungs: Path | None = None,
    ):  # fmt: skip
        self.spec, self.config, self.scaling = spec, config, scaling
        self.device, self.dtype = device, dtype
        self.target, self.rungs = target, rungs
        self.snapshots: list[Snapshot] = []
        self._nbytes = 0
        self._active: tuple[int | None, View] | None = None
        self._fetched: tuple[int, Snapshot] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """Host memory of all snapshots in bytes."""
        return self._nbytes

    def record(
        self, step: int, sparsity: float, gates: Gates, scores: dict[str, Tensor], lora: LoraWeights,
        frozen: LoraWeights | None = None, fitted: int = 0,
    ) -> bool:  # fmt: skip
        """Keep a snapshot if the sparsity passed another interval since the last one; returns whether it did.

        Args:
            frozen: ranks of `lora.refit`, of the step `fitted`.

        Raises:
            UserError: a rung cannot be written.
        """
        if not self.is_due(sparsity):
            return False
        teaches = self.may_teach(sparsity, self.target + self.config.interval / 2)
        known = Snapshot(step, sparsity, Gates(), {}, {}, {}, fitted if frozen else None, teaches)
        if teaches or self.rungs:
            last = self.snapshots[-1] if self.snapshots else known
            same = last.fitted == known.fitted and last.frozen
            whole = replace(
                known,
                gates=gates.detach().to("cpu", torch.float32, copy=True),
                scores={k: s.detach().to("cpu", torch.float32, copy=True) for k, s in scores.items()},
                # As a rung it gets the LoRA that the run ends with (`students.rung_lora`).
                lora=_on_host(lora if teaches else {}),
                frozen=last.frozen if same else trimmed(_on_host(frozen or {})),
            )
            if teaches:
                known = whole
            elif self.rungs:
                write_rung(self.rungs, whole)
        self.restore([*self.snapshots, known])
        return True

    def is_due(self, sparsity: float) -> bool:
        """Whether a snapshot at this sparsity would be kept."""
        last = self.intervals(self.snapshots[-1].sparsity) if self.snapshots else 0
        return self.intervals(sparsity) > last

    def may_teach(self, sparsity: float, mark: float) -> bool:
        """Whether a snapshot of this sparsity may teach a student of sparsity `mark`."""
        return sparsity <= self.limit(self.config, mark) + self.config.interval * _GRID_EPS

    @classmethod
    def limit(cls, config: TeacherConfig, mark: float) -> float:
        """The largest sparsity at which a snapshot may teach a student of sparsity `mark`; a policy says it."""
        return 0.0

    def restore(self, snapshots: list[Snapshot]) -> None:
        """Hold these snapshots, in memory from which an accelerator copies without waiting."""
        held = {id(s) for s in self.snapshots}
        on_card = self.device.type == "cuda"
        pinned: dict[Tensor, Tensor] = {}

        def pin(tensor: Tensor) -> Tensor:
            if tensor not in pinned:  # snapshots between two fits share their frozen pairs
                pinned[tensor] = tensor.pin_memory()
            return pinned[tensor]

        self.snapshots = [s.map(pin) if on_card and s.teaches and id(s) not in held else s for s in snapshots]
        self._nbytes = nbytes(self.snapshots)

    def activate(self, index: int | None) -> View:
        """The view of a snapshot (None: the intact model); moved and converted only when the teacher changes."""
        return self.hold(index, lambda: self._view(index))

    def hold(self, key: int | None, make: Callable[[], View]) -> View:
        """The view that was made for this key, in place of that of another key."""
        if self._active is None or self._active[0] != key:
            self._active = (key, make())
        return self._active[1]

    def prefetch(self, index: int | None) -> None:
        """Start to copy the snapshot that will teach next to the accelerator, beside the work of this step."""
        here = [held[0] for held in (self._active, self._fetched) if held is not None]
        if self._stream is None or index is None or index in here:
            return
        with torch.cuda.stream(self._stream):
            self._fetched = (index, self.snapshots[index].map(lambda t: t.to(self.device, non_blocking=True)))

    def _view(self, index: int | None) -> View:
        if index is None:
            return build_view(self.spec, None, {}, self.scaling, self.dtype)
        snapshot = self._on_device(index)
        return build_view(self.spec, snapshot.gates, joined(snapshot.lora, snapshot.frozen), self.scaling, self.dtype)

    def _on_device(self, index: int) -> Snapshot:
        if self._fetched is None or self._fetched[0] != index:
            return self.snapshots[index].map(lambda t: t.to(self.device, non_blocking=True))
        snapshot, self._fetched = self._fetched[1], None
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self._stream)
        snapshot.map(lambda t: t.record_stream(stream) or t)  # its memory was allocated for the other stream
        return snapshot

    def intervals(self, sparsity: float) -> int:
        """How many whole intervals a sparsity is."""
        return int(sparsity / self.config.interval + _GRID_EPS)


def _on_host(pairs: LoraWeights) -> Pairs:
    a_and_b = {key: [t.detach().to("cpu", torch.bfloat16, copy=True) for t in pair] for key, pair in pairs.items()}
    return {key: (a, b) for key, (a, b) in a_and_b.items()}
