"""Traffic and time of one pruning run, as arithmetic on its sizes and on stated bandwidths and FLOP/s.

What is assumed stands in the docstring of the function that assumes it, and in `ASSUMPTIONS`, which the command prints.
Units are bytes, bytes/s, FLOP and seconds. Letters as in footprint.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nuteprune.arch import ATTENTION, FFN, PROJECTIONS, ArchSpec
from nuteprune.config import Config, ConfigError
from nuteprune.masks import Gates
from nuteprune.masks.schedule import target_at
from nuteprune.masks.selection import BATCHES, MEASURED, is_measured
from nuteprune.planning.footprint import (
    FP32,
    USABLE,
    Cluster,
    Job,
    Layout,
    gate_units,
    layer_tensors,
    lora_parameters,
    partitioned,
    persistence_threshold,
    snapshots,
    total_parameters,
)
from nuteprune.runs.snapshot import Snapshot
from nuteprune.training.teachers import TeacherBank

TOKENS_PER_DOCUMENT = 427
"""C4.EN: 156e9 tokens in 365e6 documents (Dodge et al. 2021, arXiv 2104.08758, table 1)."""
GATHERS = {
    "paired": {"layers": 2, "embedding": 1, "head": 1},
    "separate": {"layers": 3, "embedding": 2, "head": 2},
}
"""Times a micro-batch gathers each weight. Layers: forward (teacher and student together, or each) and backward. The
embedding is frozen and the head's gradient is computed in the forward pass (distill.py): neither is gathered again."""
DISPATCHES, LAUNCHES = 84, 66
"""Of one layer and micro-batch, teacher, student and backward: operations sent through torch's dispatcher, and launches
of the fused kernels, as `make bench-overhead` counts them with settled gates (held by tests/unit/test_overhead.py)."""
HOST_SECONDS, TRITON_SECONDS = 24e-6, 30e-6
"""CPU time of each of them with launches stubbed, and triton's own for a launch on top: docs/results.md, "What a step
costs beside its kernels"."""
LAUNCH_SECONDS = (DISPATCHES + LAUNCHES) * HOST_SECONDS + LAUNCHES * TRITON_SECONDS
"""CPU time of one layer and micro-batch. With checkpointing the student's forward comes a second time: a third more."""
ASSUMPTIONS = (
    f"tensors may fill {USABLE:.0%} of --gpu-memory; GB = 1e9 bytes, GiB = 2^30",
    "activations are those of the dense student (step 0), the largest of the run",
    "gathered weights: the layer at work, the next one (prefetch) and the buffer it is copied out of; with the head: "
    "the head and one layer",
    "ring all-gather: each rank receives (n-1)/n of the weights; NCCL uses all of a node's NICs: 1/G of it each",
    "bandwidths are per GPU and one way; --inter-bandwidth is one GPU's NIC (a node has G of them)",
    "hpZ: frozen weights never change, so both gathers stay inside the node (counted with DeepSpeed 0.19.8)",
    f"step time: weight gathers hide behind compute, and both behind one CPU thread's {1e3 * LAUNCH_SECONDS:.1f} ms a "
    "layer and micro-batch (the longest counts; of experts, which were not measured, 3/7 for each); reading offloaded "
    "weights and the LoRA reduction do not; "
    "the bracket is without any overlap",
    "backward of a frozen weight is dx only (1x its forward); removed units cost nothing (mean kept share)",
)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one optimizer step.

    Attributes:
        gathered: sizes of all gathered weights, as counted at the communication calls.
        base: bytes of the frozen model.
        intra, inter: received by one GPU from its neighbours in the node, and through its NIC, for the weights.
        host: read from host memory by one GPU (offload).
        reduce_intra, reduce_inter: the same for LoRA gradients, updated LoRA weights and gate gradients.
    """

    gathered: float
    base: float
    intra: float
    inter: float
    host: float
    reduce_intra: float
    reduce_inter: float

    @property
    def ratio(self) -> float:
        """Gathered bytes over the model's."""
        return self.gathered / self.base


def passes(job: Job, layout: Layout) -> int:
    """Micro-batches of one step; each gathers the weights anew."""
    return -(-job.local_batch // layout.micro_batch)


def traffic(job: Job, layout: Layout, mode: str = "paired") -> Traffic:
    """Bytes a step moves; `mode` "separate" is two forward passes, for comparison.

    LoRA and gates: one ring all-reduce of float32 gradients a step (2x their bytes), whatever the micro-batches; then
    each rank sends the LoRA weights that it updated to the others (1x).
    """
    spec, s, cluster, count = job.spec, job.itemsize, job.cluster, passes(job, layout)
    ranks, threshold = cluster.ranks, persistence_threshold(spec)
    gathered = 0.0
    if layout.stage == 3 and ranks > 1:
        times = GATHERS[mode]
        layers = spec.layers * partitioned(layer_tensors(spec), ranks, threshold)[0]
        vocabulary = partitioned([spec.vocab * spec.hidden], ranks, threshold)[0]
        gathered = s * (times["layers"] * layers + (times["embedding"] + times["head"]) * vocabulary) * count
    small = 3 * FP32 * lora_parameters(job) + 2 * FP32 * gate_units(job)
    intra, inter = over_links(gathered, cluster, inside=layout.hpz)
    reduce_intra, reduce_inter = over_links(small, cluster)
    host = gathered / ranks if layout.offload else 0.0
    return Traffic(gathered, s * total_parameters(spec), intra, inter, host, reduce_intra, reduce_inter)


def over_links(size: float, cluster: Cluster, inside: bool = False) -> tuple[float, float]:
    """(intra, inter) bytes one GPU receives in a ring all-gather of `size` bytes.

    G rings, one per NIC, share the bytes: of the (n-1)/n that each GPU receives, 1/G comes through its NIC and the
    rest from its neighbours. `inside`: every node gathers for itself, (G-1)/G over the node's links.
    """
    n, g = cluster.ranks, cluster.gpus_per_node
    if inside or cluster.nodes == 1:
        return size * (g - 1) / g, 0.0
    received = size * (n - 1) / n
    return received * (g - 1) / g, received / g


@dataclass(frozen=True)
class Timing:
    """Seconds of one step: its parts, with the weight gathers hidden behind compute, and without any overlap.

    Attributes:
        compute, gather: matrix products on the GPU, and the weights that arrive beside them.
        launch: one host thread, which sends the GPU its work; where it is the slowest, the GPU waits for it.
        offload: from host memory, for which DeepSpeed waits tensor by tensor.
        reduce: gradients of LoRA and gates, and the updated LoRA.
    """

    compute: float
    gather: float
    launch: float
    offload: float
    reduce: float

    @property
    def step(self) -> float:
        return max(self.compute, self.gather, self.launch) + self.offload + self.reduce

    @property
    def serial(self) -> float:
        return max(self.compute + self.gather, self.launch) + self.offload + self.reduce


def timing(job: Job, layout: Layout, kept: tuple[float, float]) -> Timing:
    """Step time from bandwidths and FLOP/s; `kept` as from `mean_kept`. The slowest link sets the gathers' time."""
    t, c = traffic(job, layout), job.cluster
    return Timing(
        compute=step_flops(job, layout.checkpointing, kept) / c.ranks / (c.flops * c.mfu),
        gather=max(t.intra / c.intra, t.inter / c.inter),
        launch=passes(job, layout) * launch_seconds(job.spec) * (4 / 3 if layout.checkpointing else 1),
        offload=t.host / c.host,
        reduce=max(t.reduce_intra / c.intra, t.reduce_inter / c.inter),
    )


def launch_seconds(spec: ArchSpec) -> float:
    """CPU time of one micro-batch without checkpointing; each expert has three of the seven projections of its own."""
    return spec.layers * LAUNCH_SECONDS * (len(ATTENTION) + spec.experts * len(FFN)) / len(PROJECTIONS)


def step_flops(job: Job, checkpointing: bool, kept: tuple[float, float]) -> float:
    """FLOP of one step over all ranks.

    Per token: 2 per weight of the projections for the teacher's forward, the student's forward and its backward (dx
    only), scaled by the kept shares; causal attention 2·T·H·P forward and 2.5x that backward (FlashAttention); LoRA 2
    per weight forward and 4 backward; the head three times (both logits, the gradient). Checkpointing adds one forward.
    Of experts only those count that the router chooses for a token; as it always chooses as many, nothing is taken off
    for removed units where whole experts are among them.
    """
    spec, config = job.spec, job.config
    student, teacher = (1.0, 1.0) if "experts" in config.gates.units else kept
    layer = 2 * spec.prunable_read
    attention = spec.layers * 2 * config.data.seq_len * spec.heads * spec.head_dim
    lora = 2 * lora_parameters(job)
    head = 2 * spec.vocab * spec.hidden
    taught = config.teacher.mode != "none"
    forward = student * (layer + attention + lora)
    backward = student * (layer + 2.5 * attention + 2 * lora)
    tutor = teacher * (layer + attention + (lora if config.teacher.from_snapshots else 0)) if taught else 0.0
    per_token = tutor + forward * (2 if checkpointing else 1) + backward + head * (3 if taught else 2)
    return per_token * config.train.batch_size * config.data.seq_len


def mean_kept(job: Job, total: int) -> tuple[float, float]:
    """(student's, teacher's) kept share of the prunable parameters, averaged over the steps.

    The student follows the schedule; the teacher is whom `TeacherBank.choose` names with one snapshot per interval.
    """
    config = job.config
    bank = TeacherBank(job.spec, config.teacher, 1.0, torch.device("cpu"), torch.float32)
    student = teacher = 0.0
    wanted = snapshots(config, total)
    for step in range(total):
        target = target_at(config, step, total)
        bank.observe(step, target, config.sparsity.target)
        index = bank.choose(target, step, total)
        student += 1 - target
        teacher += 1 - (0.0 if index is None else bank.snapshots[index].sparsity)
        grid = (len(bank.snapshots) + 1) * config.teacher.interval
        if len(bank.snapshots) < wanted and target >= grid * (1 - 1e-9):
            bank.snapshots.append(Snapshot(step, target, Gates(), {}, {}))
    return student / total, teacher / total


def total_steps(config: Config, tokens_per_document: float) -> int:
    """Steps of the run: `train.steps`, or `train.epochs` over `data.documents` documents of an assumed length."""
    if config.train.steps:
        return config.train.steps
    if not config.data.documents:
        raise ConfigError("data.documents is 0 (all), so the planner cannot count them: set train.steps")
    blocks = config.data.documents * tokens_per_document // config.data.seq_len
    return max(1, round(config.train.epochs * blocks / config.train.batch_size))


def extra_steps(config: Config) -> int:
    """Passes over a batch outside the steps, in steps.

    Importance is a forward and backward pass, counted as one step; structures are measured by the student's forward
    alone, four to a step.
    """
    tokens = config.train.batch_size * config.data.seq_len
    importance = math.ceil(config.gates.importance_tokens / tokens) if config.gates.init == "importance" else 0
    return importance + (MEASURED * BATCHES // 4 if is_measured(config.gates) else 0)
