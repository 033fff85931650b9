"""Chooses how a run is laid out on a cluster so that it fits, and writes the settings for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nuteprune.config import Config, beyond_recipe
from nuteprune.masks import check_target
from nuteprune.planning.bill import Bill, bill, distillation_state
from nuteprune.planning.costs import Timing, Traffic, mean_kept, timing, traffic
from nuteprune.planning.distilling import distillation_memory
from nuteprune.planning.footprint import USABLE, Memory, memory
from nuteprune.planning.job import Cluster, Job, Layout
from nuteprune.planning.models import named_spec

ALIKE = 1.02
"""Layouts whose runs take this much longer than the fastest one's at most count as equally fast."""
LIMIT, HOST_LIMIT = 1.5, 1.25
"""What a job asks for, over the planned hours and host memory."""
SIGNAL = 300
"""Seconds before a job's time limit at which it is told to save, at least."""
TABLE = ("llama-3.2-1b", "llama-3.1-8b", "llama-13b", "qwen3-32b", "llama-3.1-70b", "qwen3-30b-a3b")
TARGETS = (0.2, 0.5)
"""Models and sparsities of the table."""


@dataclass(frozen=True)
class Estimate:
    """A layout with its figures.

    Attributes:
        memory, distilling: of a rank while it prunes, and while the export is distilled.
        peak: bytes on a card at the fullest moment of pruning and, where the run has it, of distillation.
        fits: that is usable memory.
    """

    layout: Layout
    memory: Memory
    distilling: Memory
    traffic: Traffic
    timing: Timing
    bill: Bill
    peak: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What the planner found.

    Attributes:
        job: the run.
        kept: mean kept share of student and teacher.
        tried: all layouts, the fastest first.
        chosen: the one to take; where none fits, the smallest.
    """

    job: Job
    kept: tuple[float, float]
    tried: list[Estimate]
    chosen: Estimate

    @property
    def hours(self) -> float:
        """Wall-clock hours of the run, if no gather of weights hides behind compute."""
        return self.chosen.bill.total / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.job.cluster.ranks

    @property
    def node_memory(self) -> float:
        """Bytes of host memory of the first node, in that of pruning and distillation which takes more."""
        stages = [self.chosen.memory] + [self.chosen.distilling] * bool(self.job.config.distill.steps)
        return max(stage.node(self.job.cluster.gpus_per_node) for stage in stages)

    @property
    def limits(self) -> dict[str, int]:
        """What a job of pruning or distillation asks for.

        `hours`, `gigabytes` of a node's host memory, and how many `signal_seconds` before the hours end a step and a
        checkpoint, which is written and read again for its hash, have to begin.
        """
        longest = max(self.chosen.bill.pruning, self.chosen.bill.distillation)
        state = distillation_state(self.job) if self.job.config.distill.steps else 0.0
        saving = 2 * state / self.job.cluster.disk + self.chosen.timing.step
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
    """The layout of a run: of those that fit and are about the fastest (`ALIKE`), the one that takes least memory.

    Weights are partitioned only where that is faster, and offloaded only where nothing fits without.

    Args:
        job: the run.
        zero: "2" or "3", or "auto": both are tried, and on one card neither, unless it must offload.

    Raises:
        UserError: the ranks do not divide the batch, or the steps cannot be counted.
    """
    kept = mean_kept(job)
    options = sorted((estimate(job, layout, kept) for layout in candidates(job, zero)), key=lambda o: o.bill.total)
    fitting = [option for option in options if option.fits]
    fitting = [option for option in fitting if not option.layout.offload] or fitting
    fast = [option for option in fitting if option.bill.total <= ALIKE * fitting[0].bill.total]
    chosen = min(fast, key=lambda o: (o.layout.stage, o.peak), default=min(options, key=lambda o: o.peak))
    return Plan(job, kept, options, chosen)


def candidates(job: Job, zero: str) -> Iterator[Layout]:
    """All layouts: the whole batch of a rank and its halves or the configured micro-batch, with and without activation
    checkpointing; under ZeRO-3 also offloaded or, on several nodes, with hpZ."""
    cluster, local = job.cluster, job.local_batch
    sizes = [local]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    for micro_batch in sorted({*sizes, min(job.config.train.micro_batch or local, local)}):
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


def estimate(job: Job, layout: Layout, kept: tuple[float, float]) -> Estimate:
    """All figures of one layout."""
    need, distilling, step = memory(job, layout), distillation_memory(job, layout), timing(job, layout, kept)
    peak = max(need.peak, distilling.peak if job.config.distill.steps else 0.0)
    fits = peak <= USABLE * job.cluster.card.memory
    return Estimate(layout, need, distilling, traffic(job, layout), step, bill(job, layout, step), peak, fits)


def largest_micro_batch(job: Job, layout: Layout, room: float, distilling: bool = False) -> int:
    """The largest of a rank's batch and its halves with which a layout fits into `room` bytes; 1 where none does.

    `distilling`: the export, instead of pruning.
    """
    need, size = distillation_memory if distilling else memory, job.local_batch
    while size > 1 and need(job, replace(layout, micro_batch=size)).peak > USABLE * room:
        size = -(-size // 2)
    return size


def run_settings(plan: Plan, deepspeed: str = "") -> dict:
    """The run's YAML as a nested dict: what differs from its recipe, with the chosen layout filled in.

    Args:
        plan: the plan.
        deepspeed: path of the DeepSpeed file, for a layout that has one.
    """
    layout, config = plan.chosen.layout, plan.job.config
    train = replace(config.train, micro_batch=layout.micro_batch, activation_checkpointing=layout.checkpointing)
    return beyond_recipe(replace(config, train=train, deepspeed=deepspeed if layout.stage else ""))


def deepspeed_settings(plan: Plan) -> dict:
    """The DeepSpeed configuration of the chosen layout: what a run does not fill in itself (zero.py)."""
    layout = plan.chosen.layout
    zero: dict = {"stage": layout.stage}
    if layout.stage == 3:
        zero["overlap_comm"] = True
    if layout.offload:
        zero["offload_param"] = {"device": "cpu"}
    if layout.hpz:
        zero["zero_hpz_partition_size"] = "auto"  # fine-tuning may get other nodes
    return {"zero_optimization": zero}


def table(base: Config, cluster: Cluster, tokens_per_document: float, zero: str = "auto") -> list[list[Plan]]:
    """Plans of `TABLE` on one card, a node and two nodes in bfloat16, each at `TARGETS`; the batch is rounded up to a
    multiple of the ranks.

    Mixtures of experts in the uniform shape with LoRA on what can have it, as they are pruned.
    """
    rows = []
    for name in TABLE:
        spec, gates = named_spec(name), base.gates
        if spec.experts > 1:
            gates = replace(gates, shape="uniform", units=["kv_groups", "experts", "ffn"])
        lora = replace(base.lora, targets=[target for target in base.lora.targets if target in spec.lora_targets])
        model = replace(base.model, path=name, dtype="bfloat16")
        check_target(spec, gates, max(TARGETS), lora.targets)
        for nodes, cards in ((1, 1), (1, cluster.gpus_per_node), (2, cluster.gpus_per_node)):
            machines, ranks = replace(cluster, nodes=nodes, gpus_per_node=cards), nodes * cards
            train = replace(base.train, batch_size=-(-base.train.batch_size // ranks) * ranks)
            config = replace(base, model=model, train=train, gates=gates, lora=lora)
            configs = [replace(config, sparsity=replace(config.sparsity, target=target)) for target in TARGETS]
            rows.append([lay_out(Job(spec, each, machines, tokens_per_document), zero) for each in configs])
    return rows
