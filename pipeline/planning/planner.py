"""Chooses how each stage of a run is laid out on a cluster so that it fits, and writes the settings for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from nuteprune.config import beyond_recipe
from nuteprune.masks import check_target
from nuteprune.planning.bill import (
    Bill,
    checkpoint_bytes,
    distillation_bill,
    distillation_bytes,
    distillation_state,
    evaluation_seconds,
    export_seconds,
    pruning_bill,
)
from nuteprune.planning.costs import Timing, Traffic, mean_kept, timing, traffic
from nuteprune.planning.distilling import distillation_memory, distillation_timing, distillation_traffic
from nuteprune.planning.footprint import USABLE, Memory, memory
from nuteprune.planning.job import Job, Layout

ALIKE = 1.02
"""Layouts in which a stage takes this much longer than in the fastest one at most count as equally fast."""
LIMIT, HOST_LIMIT = 1.5, 1.25
"""What a job asks for, over the planned hours and host memory."""
SIGNAL = 300
"""Seconds before a job's time limit at which it is told to save, at least."""


@dataclass(frozen=True)
class Estimate:
    """A stage in one layout: memory of a rank, traffic and time of a step, seconds of the stage; whether it fits."""

    layout: Layout
    memory: Memory
    traffic: Traffic
    timing: Timing
    bill: Bill
    fits: bool

    @property
    def peak(self) -> float:
        """Bytes on a card at the fullest moment."""
        return self.memory.peak


@dataclass(frozen=True)
class StagePlan:
    """A stage of training.

    Attributes:
        name: "prune" or "distill".
        steps: how many it takes.
        tried: all layouts, the fastest first.
        chosen: the one to take; where none fits, the smallest.
    """

    name: str
    steps: int
    tried: list[Estimate]
    chosen: Estimate


@dataclass(frozen=True)
class Plan:
    """What the planner found.

    Attributes:
        job: the run.
        kept: mean kept share of student and teacher while it prunes.
        stages: those that all ranks run, in their order.
        beside: seconds of the others, by name, and of waiting for them.
    """

    job: Job
    kept: tuple[float, float]
    stages: list[StagePlan]
    beside: dict[str, float]

    @property
    def pruning(self) -> Estimate:
        """What was chosen to prune."""
        return self.stages[0].chosen

    @property
    def distilling(self) -> Estimate | None:
        """What was chosen to distil the export, where the run does."""
        return self.stages[1].chosen if len(self.stages) > 1 else None

    @property
    def fits(self) -> bool:
        return all(stage.chosen.fits for stage in self.stages)

    @property
    def peak(self) -> float:
        """Bytes on a card at the fullest moment of the run."""
        return max(stage.chosen.peak for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of the whole run, if no gather of weights hides behind compute."""
        return sum(stage.chosen.bill.total for stage in self.stages) + sum(self.beside.values())

    @property
    def best(self) -> float:
        """The same, if every gather does."""
        return self.seconds - sum(stage.chosen.bill.hidden for stage in self.stages)

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    @property
    def gpu_hours(self) -> float:
        """All cards are there in every stage."""
        return self.hours * self.job.cluster.ranks

    @property
    def node_memory(self) -> float:
        """Bytes of host memory of the first node, in the stage that takes most."""
        return max(stage.chosen.memory.node(self.job.cluster.gpus_per_node) for stage in self.stages)

    @property
    def written(self) -> dict[str, float]:
        """Bytes that the run writes, by part; all of it stays on the disk but older states."""
        pruned = checkpoint_bytes(self.job, self.pruning.timing.step)
        distilling = self.distilling
        return pruned | (distillation_bytes(self.job, distilling.timing.step) if distilling else {})

    @property
    def limits(self) -> dict[str, int]:
        """What a job of one of the stages asks for.

        `hours`, `gigabytes` of a node's host memory, and how many `signal_seconds` before the hours end a step and a
        checkpoint, which is written and read again for its hash, have to begin.
        """
        longest = max(stage.chosen.bill.total for stage in self.stages)
        state = distillation_state(self.job) if self.distilling else 0.0
        saving = 2 * state / self.job.cluster.disk + max(stage.chosen.timing.step for stage in self.stages)
        return {
            "hours": math.ceil(LIMIT * longest / 3600),
            "gigabytes": math.ceil(HOST_LIMIT * self.node_memory / 1e9),
            "signal_seconds": max(SIGNAL, math.ceil(LIMIT * saving)),
        }


def make_plan(job: Job, zero: str = "auto") -> Plan:
    """The plan of a run; raises `UserError` as `lay_out` does, and where the target is out of reach."""
    check_target(job.spec, job.config.gates, job.config.sparsity.target, job.config.lora.targets)
    return lay_out(job, zero)


def lay_out(job: Job, zero: str = "auto") -> Plan:
    """The layout of each stage: of those that fit and are about the fastest (`ALIKE`), the one that takes least memory.

    Weights are partitioned only where that is faster, and offloaded only where nothing fits without.

    Args:
        job: the run.
        zero: "2" or "3", or "auto": both are tried, and on one card neither, unless it must offload.

    Raises:
        UserError: the ranks do not divide the batch, or the steps cannot be counted.
    """
    kept = mean_kept(job)
    wanted = {"prune": job.steps} | ({"distill": job.config.distill.steps} if job.config.distill.steps else {})
    stages = []
    for name, steps in wanted.items():
        tried = sorted((estimate(name, job, each, kept) for each in candidates(job, zero)), key=lambda o: o.bill.total)
        stages.append(StagePlan(name, steps, tried, best_of(tried)))
    return Plan(job, kept, stages, {"export": export_seconds(job), "evaluate": evaluation_seconds(job)})


def best_of(tried: Iterable[Estimate]) -> Estimate:
    """Of layouts that fit and are about the fastest the one that takes least memory; of none that fit the smallest."""
    options = sorted(tried, key=lambda option: option.bill.total)
    fitting = [option for option in options if option.fits]
    fitting = [option for option in fitting if not option.layout.offload] or fitting
    fast = [option for option in fitting if option.bill.total <= ALIKE * fitting[0].bill.total]
    return min(
        fast, key=lambda o: (o.layout.stage, o.peak), default=min(options, key=lambda o: (o.peak, o.layout.micro_batch))
    )


def candidates(job: Job, zero: str) -> Iterator[Layout]:
    """All layouts: the whole batch of a rank and its halves or the configured micro-batch, with and without activation
    checkpointing; under ZeRO-3 also offloaded or, on several nodes, with hpZ."""
    cluster, local = job.cluster, job.local_batch
    for micro_batch in sorted({*halves(local), min(job.config.train.micro_batch or local, local)}):
        for checkpointing in (False, True):
            if zero != "3":
                yield Layout(0 if zero == "auto" and cluster.ranks == 1 else 2, micro_batch, checkpointing)
            if zero == "2":
                continue
            if zero == "3" or cluster.ranks > 1:
                yield Layout(3, micro_batch, checkpointing)
            yield Layout(3, micro_batch, checkpointing, offload=True)
            if cluster.nodes > 1 and cluster.gpus_per_node > 1:
                yield Layout(3, micro_batch, checkpointing, hpz=True)


def within(stage: str, job: Job, layout: Layout) -> Layout:
    """A layout with the micro-batch and activation checkpointing (if it has none) to start a stage with: of those that
    fit and are about the fastest (`ALIKE`) the largest micro-batch, if possible without checkpointing."""
    kept, again = mean_kept(job), (True,) if layout.checkpointing else (False, True)
    sizes = [replace(layout, micro_batch=size, checkpointing=on) for size in halves(job.local_batch) for on in again]
    tried = [estimate(stage, job, each, kept) for each in sizes]
    least = min((each.bill.total for each in tried if each.fits), default=0.0)
    fast = [each.layout for each in tried if each.fits and each.bill.total <= ALIKE * least]
    return max(fast, key=lambda each: (not each.checkpointing, each.micro_batch), default=best_of(tried).layout)


def halves(size: int) -> list[int]:
    """A number of sequences and its halves, rounded up, down to 1."""
    return [size] if size <= 1 else [size, *halves(-(-size // 2))]


def estimate(stage: str, job: Job, layout: Layout, kept: tuple[float, float]) -> Estimate:
    """All figures of a stage ("prune" or "distill") in one layout."""
    if stage == "distill":
        need, moved = distillation_memory(job, layout), distillation_traffic(job, layout)
        step = distillation_timing(job, layout)
        bill = distillation_bill(job, layout, step)
    else:
        need, moved, step = memory(job, layout), traffic(job, layout), timing(job, layout, kept)
        bill = pruning_bill(job, layout, step)
    return Estimate(layout, need, moved, step, bill, need.peak <= USABLE * job.cluster.card.memory)


def run_settings(plan: Plan, files: dict[str, str]) -> dict:
    """The run's YAML as a nested dict: what differs from its recipe, with the DeepSpeed files of the chosen layouts.

    Micro-batch and activation checkpointing stay open: each stage chooses them as the planner does, for the memory that
    is free when it starts.

    Args:
        plan: the plan.
        files: paths of the DeepSpeed files by stage, of those whose layout has one.
    """
    config = plan.job.config
    train = replace(config.train, micro_batch=0, activation_checkpointing=False)
    pruning, distilling = (files.get(stage, "") for stage in ("prune", "distill"))
    distill = replace(config.distill, deepspeed="" if distilling == pruning else distilling)
    return beyond_recipe(replace(config, train=train, deepspeed=pruning, distill=distill))


def deepspeed_settings(layout: Layout) -> dict:
    """The DeepSpeed configuration of a layout: what a run does not fill in itself (zero.py)."""
    zero: dict = {"stage": layout.stage}
    if layout.stage == 3:
        zero["overlap_comm"] = True
    if layout.offload:
        zero["offload_param"] = {"device": "cpu"}
    if layout.hpz:
        zero["zero_hpz_partition_size"] = "auto"  # fine-tuning may get other nodes
    return {"zero_optimization": zero}
