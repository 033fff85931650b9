"""The optimizer of a model whose own weights learn, whole in one process or shared out over the ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nuteprune.masks.schedule import Schedule
from nuteprune.training.engine import LARGEST_NORM, LossScale, StepResult

_BETAS = 0.9, 0.95
_MOMENTS = "exp_avg", "exp_avg_sq"


class WeightsEngine:
    """AdamW of the weights that are in training, each rank of its own share.

    Args:
        model: in training; gradients of its shared out weights come averaged over the ranks.
        schedule: the run's steps, with learning rates.
        dtype: compute type of the forward pass.

    Attributes:
        peak: learning rate at its highest; to be set before the first step.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, dtype: torch.dtype):
        self.schedule, self.peak, self.scale = schedule, 0.0, LossScale(dtype)
        # A parameter without elements, of a layer that has lost all units, has no share to train.
        self.weights = {n: weight for n, weight in model.named_parameters() if weight.requires_grad and weight.numel()}
        self.adamw = torch.optim.AdamW(self.weights.values(), betas=_BETAS, weight_decay=0.0, fused=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's share of the loss."""
        (loss * self.scale.value).backward()

    def step(self, step: int) -> StepResult:
        """Clip and apply the gradients of optimizer step `step`; one that is not finite skips it."""
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        if self.scale.value != 1:
            torch._foreach_div_(gradients, self.scale.value)
        self.adamw.param_groups[0]["lr"] = self.peak * self.schedule.lora_share(step)
        found = nn.utils.clip_grad_norm_(self.weights.values(), LARGEST_NORM)
        norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
        finite = math.isfinite(norm)
        self.scale.update(finite)
        if finite:
            self.adamw.step()
        self.discard()
        return StepResult(norm, not finite)

    def discard(self) -> None:
        """Forget accumulated gradients."""
        self.adamw.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, by name; those of a first step where there has been none."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            moments = self.adamw.state[weight]
            if not moments:
                moments |= {"step": torch.zeros((), device=weight.device)}
                moments |= {key: torch.zeros_like(weight, requires_grad=False) for key in _MOMENTS}
            tensors |= {f"{name}:weight": weight.detach()} | {f"{name}:{key}": each for key, each in moments.items()}
        return tensors
