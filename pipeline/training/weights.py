"""The optimizer of a model whose own weights learn, whole in one process or shared out over the ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from nuteprune.masks.schedule import Schedule
from nuteprune.training.engine import LARGEST_NORM, StepResult

_BETAS, _EPS = (0.9, 0.95), 1e-8


class WeightsEngine:
    """AdamW of the weights that are in training, each rank of its own share.

    Its moments wait in the compute type, which halves them in bfloat16, and are float32 while a weight is updated
    (docs/experiments.md).

    Args:
        model: in training; gradients of its shared out weights come averaged over the ranks.
        schedule: the run's steps, with learning rates.
        dtype: compute type of the forward pass.

    Attributes:
        peak: learning rate at its highest; to be set before the first step.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, dtype: torch.dtype):
        self.schedule, self.peak, self.dtype = schedule, 0.0, dtype
        # A parameter without elements, of a layer that has lost all units, has no share to train.
        self.weights = {n: weight for n, weight in model.named_parameters() if weight.requires_grad and weight.numel()}
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.steps = torch.zeros(())

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's share of the loss."""
        loss.backward()

    @torch.no_grad()
    def step(self, step: int) -> StepResult:
        """Clip and apply the gradients of optimizer step `step`; one that is not finite skips it."""
        found = nn.utils.clip_grad_norm_(self.weights.values(), LARGEST_NORM)
        norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
        finite = math.isfinite(norm)
        if finite:
            self._update(self.peak * self.schedule.lora_share(step))
        self.discard()
        return StepResult(norm, not finite)

    def _update(self, rate: float) -> None:
        state = self.state()
        for name, weight in self.weights.items():
            if weight.grad is None:
                continue
            tensors = weight, weight.grad, state[f"{name}:exp_avg"], state[f"{name}:exp_avg_sq"]
            own, slope, *kept = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
            first, second = (moment.float() for moment in kept)
            count = self.steps.to(own.device, copy=True)
            adamw([own], [slope], [first], [second], [], [count], fused=True, amsgrad=False, beta1=_BETAS[0],
                  beta2=_BETAS[1], lr=rate, weight_decay=0.0, eps=_EPS, maximize=False)  # fmt: skip
            for moment, value in zip(kept, (first, second), strict=True):
                moment.copy_(value)
        self.steps += 1

    def discard(self) -> None:
        """Forget accumulated gradients."""
        for weight in self.weights.values():
            weight.grad = None

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Weights and moments, by name, and the count of steps; those of a first step where there has been none."""
        dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        tensors = {"steps": self.steps}
        for name, weight in self.weights.items():
            if name not in self.moments:
                first, second = (torch.zeros_like(weight, dtype=dtype, requires_grad=False) for _ in range(2))
                self.moments[name] = first, second
            first, second = self.moments[name]
            tensors |= {f"{name}:weight": weight.detach(), f"{name}:exp_avg": first, f"{name}:exp_avg_sq": second}
        return tensors
