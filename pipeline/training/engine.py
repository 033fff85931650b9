"""The optimizer side of a run: gradients of all ranks, learning rates, clipping, and skipping of steps that went wrong.

Gates, multipliers and LoRA are whole on every rank. Their gradients lie in one flat buffer, which one all-reduce a step
averages; every rank then makes the same update, so all of them hold the same bits. Under ZeRO each rank updates a share
of the LoRA matrices, holds AdamW's state of those only, and sends them to the others.

DeepSpeed's own ZeRO-2 reduces gradients in the order in which a rank's backward pass makes them. That order was a
rank's own while ranks drew their own gates; it has not been tried since they draw the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nuteprune.arch import projections
from nuteprune.masks import MaskSet
from nuteprune.masks.schedule import Schedule
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.distributed import World, gathered
from nuteprune.training.importance import unit_costs
from nuteprune.training.preconditioning import B_RATE, Preconditioner

LARGEST_NORM = 1.0
"""Of LoRA's gradient, which is scaled down to it (the paper's)."""
MULTIPLIER_RATE = 0.1
"""Ascent rate of the Lagrangian's multipliers (the paper's)."""
RELATIVE_RATE = 1.04e-2
"""LoRA's peak learning rate over the root mean square of the weights that it updates, at rank 16, where
`train.lora_lr` is 0: it moves weights by as large a share of themselves in every model (docs/experiments.md)."""
_GATE_MOMENTUM = 0.9


class Multipliers(nn.Module):
    """λ₁, λ₂ of the augmented Lagrangian λ₁(ŝ−t) + λ₂(ŝ−t)² (paper, eq. 6), moved by gradient ascent."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(2))

    def penalty(self, expected: Tensor, target: float) -> Tensor:
        """The constraint's term of the loss; `expected` is the expected sparsity."""
        gap = (expected - target).float()
        return self.values[0] * gap + self.values[1] * gap.square()


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: the LoRA gradient's norm, and whether the step was skipped as not finite."""

    grad_norm: float
    skipped: bool


class Engine:
    """Optimizers of LoRA, gates and multipliers, alike on every rank.

    Args:
        model: holds the LoRA parameters.
        masks: holds log-alpha.
        multipliers: the Lagrangian's multipliers, or None under the projection.
        schedule: the run's steps, with learning rates.
        world: the ranks whose gradients are averaged.
        sharded: each rank holds the state of a share of LoRA's optimizer.
        relative: LoRA's peak learning rate over the root mean square of the weights, where `train.lora_lr` is 0.

    Attributes:
        peak: LoRA's peak learning rate.
    """

    def __init__(
        self, model: PairedModel, masks: MaskSet, multipliers: Multipliers | None, schedule: Schedule, world: World,
        sharded: bool = False, relative: float = RELATIVE_RATE,
    ):  # fmt: skip
        self.schedule, self.masks, self.world = schedule, masks, world
        train, gates = schedule.train, schedule.gates
        self.peak = train.lora_lr or relative_rate(model, relative)
        self.lora = [p for pair in model.lora().values() for p in pair]  # A, B, A, B, …
        self.alphas = list(masks.log_alpha.values())
        costs = unit_costs(masks.spec)
        least = min((costs[kind] for kind in masks.log_alpha), default=1.0)
        # As multiples of the least, so that no square of a gradient underflows.
        self.costs = {kind: costs[kind] / least for kind in masks.log_alpha}
        scaled = train.lora_optimizer == "scaled"
        adamw = {"lr": self.peak, "weight_decay": 0.0, "fused": True}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        if self.lora:
            rates = (1.0, B_RATE if scaled else 1.0)
            factors = [{"params": self.lora[i::2], "rate": rate} for i, rate in enumerate(rates)]
            make = _sharded_adamw if sharded and world.size > 1 else torch.optim.AdamW
            self.optimizers["lora"] = make(factors, **adamw)
        if gates.optimizer == "adam":
            self.optimizers["gates"] = torch.optim.AdamW(self.alphas, lr=gates.lr, weight_decay=0.0)
        else:
            reach = gates.lr / schedule.settle
            self.optimizers["gates"] = torch.optim.SGD(self.alphas, lr=reach, momentum=_GATE_MOMENTUM)
        if multipliers is not None:
            self.optimizers["multipliers"] = torch.optim.AdamW(
                multipliers.parameters(), lr=MULTIPLIER_RATE, weight_decay=0.0, maximize=True
            )
        self.gradients = _flat_gradients([p for o in self.optimizers.values() for p in _parameters(o)])
        self.update = model.update
        self.precondition = Preconditioner(self.update.lora.values()) if scaled else None

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's share of the loss."""
        loss.backward()

    def step(self, step: int) -> StepResult:
        """Average, clip and apply the gradients of optimizer step `step`; one that is not finite skips it."""
        self.world.mean(self.gradients)
        for group in self.optimizers["lora"].param_groups if self.lora else ():
            group["lr"] = group["rate"] * self.peak * self.schedule.lora_share(step)
        norm = nn.utils.clip_grad_norm_(self.lora, LARGEST_NORM)
        # A sum of zeros, or of NaNs where one gradient is not finite; with the norm, for one wait for the device.
        odd = (self.gradients * 0).sum()
        norm, odd = torch.stack([norm.to(odd), odd]).double().tolist()  # the norm of no LoRA at all is on the host
        finite = math.isfinite(norm) and odd == 0
        if finite:
            if self.precondition:
                self.precondition()
            moving = self.masks.fixed is None  # settled gates no longer move, not even by momentum
            if moving and self.schedule.gates.optimizer == "sgd":
                self._normalize()
            for name, optimizer in self.optimizers.items():
                if moving or name != "gates":
                    optimizer.step()
            self.update.refresh()
            self.masks.clamp()
        self.discard()
        return StepResult(norm, not finite)

    @torch.no_grad()
    def _normalize(self) -> None:
        """Gradients of log-alpha per parameter of a unit, divided by their root mean square over the units in play.

        One log-alpha ranks the units of all kinds, by what a parameter of theirs is worth, as their start does. Units
        in play are those with a nonzero gradient.
        """
        gradients = [alpha.grad.div_(self.costs[kind]) for kind, alpha in self.masks.log_alpha.items()]
        squares = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        count = torch.stack([gradient.count_nonzero() for gradient in gradients]).sum()
        scale = (squares / count.clamp(min=1)).sqrt()
        torch._foreach_div_(gradients, scale + (scale == 0))

    def collect(self) -> None:
        """Bring the shards of the LoRA optimizer's state to rank 0, for a checkpoint; collective."""
        if hasattr(self.optimizers.get("lora"), "consolidate_state_dict"):
            self.optimizers["lora"].consolidate_state_dict(to=0)
            if self.world.device.type == "cuda":  # it copies to the CPU without waiting for the copies
                torch.cuda.synchronize(self.world.device)

    def discard(self) -> None:
        """Forget accumulated gradients."""
        self.gradients.zero_()


@torch.no_grad()
def relative_rate(model: PairedModel, share: float) -> float:
    """A share of the root mean square of the weights that LoRA updates, to two digits: alike on all ranks.

    At another rank than 16 times √(16 / rank).

    Collective.
    """
    lora, squares, count = model.lora(), [], 0
    for index, each in enumerate(model.layers):
        for name, (owner, attribute) in projections(each.layer).items():
            if f"{index}.{name}" in lora:
                weight = getattr(owner, attribute).weight
                with gathered(weight):
                    squares.append(torch.linalg.vector_norm(weight, dtype=torch.float32).square())
                    count += weight.numel()
    if not squares:
        return 0.0
    size = math.sqrt(float(torch.stack(squares).double().sum()) / count)
    rank = len(next(iter(lora.values()))[0])
    return float(f"{share * size * math.sqrt(16 / rank):.1e}")


def _sharded_adamw(parameters: list[dict], **options) -> torch.optim.Optimizer:
    """AdamW whose state is spread over the ranks: each updates its share and sends it to the others."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, parameters_as_bucket_view=True, **options)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _flat_gradients(parameters: list[nn.Parameter]) -> Tensor:
    """One zero float32 buffer whose parts are the parameters' gradients, into which backward adds.

    A parameter that takes no part in a step (a layer that is wholly removed on this rank) has a gradient of zero there,
    so all ranks reduce the same.
    """
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat
