"""How the target sparsity and the sampling noise move over the steps of a run."""

from __future__ import annotations

import math

from nuteprune.config import Config

LORA_WARMUP = 0.03
"""Share of the steps over which LoRA's learning rate rises from 0."""


def target_at(config: Config, step: int, total: int) -> float:
    """Target sparsity after optimizer step `step` (0-based) of `total`: rises to the full target by the warm-up's end.

    Linear for the Lagrangian as in the paper (section 3.2), else cubic as in Zhu & Gupta 2017: t·(1 − (1 − p)³).
    """
    progress = min(1.0, (step + 1) / warmup_steps(config, total))
    if config.sparsity.constraint == "projection":
        progress = 1.0 - (1.0 - progress) ** 3
    return config.sparsity.target * progress


def warmup_steps(config: Config, total: int) -> int:
    """Steps over which the target rises, at least 1."""
    return max(1, round(config.sparsity.warmup * total))


def settle_step(config: Config, total: int) -> int:
    """First step at which the gates are settled to 0/1: at the warm-up's end at the earliest, never if settle is 1."""
    if config.gates.settle == 1:
        return total
    return max(1, min(total - 1, max(round(config.gates.settle * total), warmup_steps(config, total))))


def noise_at(config: Config, step: int, total: int) -> float:
    """Noise scale ν at `step`: geometric from `gates.noise` to `noise_end` at the step the gates settle."""
    start, end = config.gates.noise, config.gates.noise_end
    if start == end:
        return start
    progress = min(1.0, step / max(1, min(settle_step(config, total), total) - 1))
    low = 1e-3
    return max(start, low) * (max(end, low) / max(start, low)) ** progress


def lora_lr_at(config: Config, step: int, total: int) -> float:
    """LoRA's learning rate at `step`: linear warm-up, then cosine to a tenth of the peak; the paper's linear to 0."""
    train = config.train
    warm = 1 if train.lora_optimizer == "adamw" else max(1, round(LORA_WARMUP * total))
    if step < warm:
        return train.lora_lr * (step + 1) / warm
    progress = (step - warm) / max(1, total - warm)
    if train.lora_optimizer == "adamw":
        return train.lora_lr * (1 - progress)
    return train.lora_lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
