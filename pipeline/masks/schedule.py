"""What a run is over its steps: how many there are, when its gates settle, and what moves from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from nuteprune.config import Config, GateConfig, SparsityConfig, TrainConfig

LORA_WARMUP = 0.03
"""Share of the steps over which LoRA's learning rate rises from 0."""
_LEAST_NOISE = 1e-3
"""A geometric path cannot begin or end at 0."""


@dataclass(frozen=True)
class Schedule:
    """The steps of one run and the settings of what moves over them; made once, when the length of its text is known.

    Attributes:
        total: steps of the run.
    """

    total: int
    train: TrainConfig
    gates: GateConfig
    sparsity: SparsityConfig

    @classmethod
    def of(cls, config: Config, steps_per_epoch: float) -> Schedule:
        """`train.steps`, or where that is 0 `train.epochs` over the text."""
        train = config.train
        total = train.steps or max(1, round(train.epochs * steps_per_epoch))
        return cls(total, train, config.gates, config.sparsity)

    @property
    def warmup(self) -> int:
        """Steps over which the target rises, at least 1."""
        return max(1, round(self.sparsity.warmup * self.total))

    @cached_property
    def settle(self) -> int:
        """First step at which the gates are 0 or 1, from 1 on: at the warm-up's end at the earliest; `total`: never."""
        if self.gates.settle == 1:
            return self.total
        return max(1, min(self.total - 1, max(round(self.gates.settle * self.total), self.warmup)))

    def target(self, step: int) -> float:
        """Target sparsity after optimizer step `step` (0-based): rises to the full target by the warm-up's end.

        Linear for the Lagrangian as in the paper (section 3.2), else cubic as in Zhu & Gupta 2017: t·(1 − (1 − p)³).
        """
        progress = min(1.0, (step + 1) / self.warmup)
        if self.sparsity.constraint == "projection":
            progress = 1.0 - (1.0 - progress) ** 3
        return self.sparsity.target * progress

    def noise(self, step: int) -> float:
        """Noise scale ν at `step`: geometric from `gates.noise` to `noise_end` at the step the gates settle."""
        start, end = self.gates.noise, self.gates.noise_end
        if start == end:
            return start
        start, end = max(start, _LEAST_NOISE), max(end, _LEAST_NOISE)
        return start * (end / start) ** min(1.0, step / max(1, self.settle - 1))

    def lora_share(self, step: int) -> float:
        """LoRA's learning rate over its peak: linear warm-up, then cosine to a tenth; the paper's linear to 0."""
        papers = self.train.lora_optimizer == "adamw"
        warm = 1 if papers else max(1, round(LORA_WARMUP * self.total))
        if step < warm:
            return (step + 1) / warm
        progress = (step - warm) / max(1, self.total - warm)
        if papers:
            return 1 - progress
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
