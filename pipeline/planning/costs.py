"""Traffic and time of one pruning run, as arithmetic on its sizes and on stated bandwidths and FLOP/s.

What is assumed stands in the docstring of the function that assumes it, and in `ASSUMPTIONS`, which the command prints.
Units are bytes, bytes/s, FLOP and seconds. Letters as in footprint.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nuteprune.arch import ATTENTION, FFN, PROJECTIONS, ArchSpec
from nuteprune.masks import Gates
from nuteprune.parallel.sizes import layer_tensors, partitioned, persistence_threshold, total_parameters
from nuteprune.planning.footprint import USABLE
from nuteprune.planning.job import (
    FP32,
    Cluster,
    Job,
    Layout,
)
from nuteprune.runs.snapshot import Snapshot

GATHERS = {
    "paired": {"layers": 2, "embedding": 1, "head": 1},
    "separate": {"layers": 3, "embedding": 2, "head": 2},
    "distilling": {"layers": 1, "embedding": 1, "head": 1},
}
"""Times a micro-batch gathers each weight of the intact model. Layers: forward (teacher and student together, or each)
and backward; in distillation the teacher has no backward. The embedding is frozen, the head's gradient is computed in
the forward pass (losses/head.py): neither is gathered again."""
HEAD_TENSORS = 61
"""Float32 tensors of a chunk's logits [chunk, V] that the output loss reads or writes: counted in losses/head.py."""
DISPATCHES, LAUNCHES = 84, 66
"""Of one layer and micro-batch, teacher, student and backward: operations sent through torch's dispatcher, and launches
of the kernels, as tests/overhead.py counts them with settled gates."""
HOST_SECONDS, TRITON_SECONDS = 24e-6, 30e-6
"""CPU time of each of them with launches stubbed, and triton's own for a launch on top: docs/results.md, "What a step
costs beside its kernels"."""
LAUNCH_SECONDS = (DISPATCHES + LAUNCHES) * HOST_SECONDS + LAUNCHES * TRITON_SECONDS
"""CPU time of one layer and micro-batch. With checkpointing the student's forward comes a second time: a third more."""
ASSUMPTIONS = (
    f"tensors may fill {USABLE:.0%} of a card; GB = 1e9 bytes, GiB = 2^30",
    "activations are those of the dense student (step 0), the largest of the run",
    "gathered weights: the layer at work, the next one (prefetch) and the buffer it is copied out of; with the head: "
    "the head and one layer",
    "ring all-gather: each rank receives (n-1)/n of the weights; NCCL uses all of a node's NICs: 1/G of it each",
    "bandwidths are per GPU and one way, as in data sheets; --inter-bandwidth is one GPU's NIC (a node has G of them)",
    "hpZ: frozen weights never change, so both gathers stay inside the node (counted with DeepSpeed 0.19.8)",
    f"hours are those of a run in which no gather of weights hides behind compute; one CPU thread's "
    f"{1e3 * LAUNCH_SECONDS:.1f} ms a layer and micro-batch do hide, or are waited for (of experts, which were not "
    "measured, 3/7 for each); in brackets the hours where every gather hides; how much does is not known before a run",
    "products reach --mfu of the card's peak, or what its memory delivers of the weights, if that takes longer",
    "backward of a frozen weight is dx only (1x its forward); removed units cost nothing (mean kept share)",
    f"the output loss moves {HEAD_TENSORS} float32 tensors of the size of its logits; a step of distillation launches "
    "as many kernels as one of pruning",
    "export folds on one thread of the CPU; evaluation reads the weights once for each token that it decodes",
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
    used = 0.0
    if layout.stage == 3:
        times = GATHERS[mode]
        layers = spec.layers * partitioned(layer_tensors(spec), ranks, threshold)[0]
        vocabulary = partitioned([spec.vocab * spec.hidden], ranks, threshold)[0]
        used = s * (times["layers"] * layers + (times["embedding"] + times["head"]) * vocabulary) * count
    small = 3 * FP32 * job.lora_parameters + 2 * FP32 * job.gate_units
    gathered = used if ranks > 1 else 0.0
    intra, inter = over_links(gathered, cluster, inside=layout.hpz)
    reduce_intra, reduce_inter = over_links(small, cluster)
    host = used / ranks if layout.offload else 0.0
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
    """Seconds of one step: its parts, and how they add up.

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
        """Where no gather hides behind compute."""
        return max(self.compute + self.gather, self.launch) + self.offload + self.reduce

    @property
    def best(self) -> float:
        """Where every gather does."""
        return max(self.compute, self.gather, self.launch) + self.offload + self.reduce


def timing(job: Job, layout: Layout, kept: tuple[float, float]) -> Timing:
    """Step time from bandwidths and FLOP/s; `kept` as from `mean_kept`."""
    t, c = traffic(job, layout), job.cluster
    return Timing(
        compute=max(step_flops(job, layout.checkpointing, kept) / c.ranks / job.flops, read_seconds(job, layout, kept))
        + head_seconds(job),
        gather=gather_seconds(t.intra, t.inter, c),
        launch=passes(job, layout) * launch_seconds(job.spec) * (4 / 3 if layout.checkpointing else 1),
        offload=t.host / c.card.host,
        reduce=gather_seconds(t.reduce_intra, t.reduce_inter, c),
    )


def head_seconds(job: Job) -> float:
    """Time in which a card's memory reads and writes the logits of a step's tokens (`HEAD_TENSORS`)."""
    return HEAD_TENSORS * FP32 * job.spec.vocab * job.tokens / job.cluster.ranks / job.cluster.card.bandwidth


def gather_seconds(intra: float, inter: float, cluster: Cluster) -> float:
    """Time of bytes that one GPU receives over each kind of link, as from `over_links`: the slower link's."""
    return max(intra / cluster.card.link, inter / cluster.card.nic)


def read_seconds(job: Job, layout: Layout, kept: tuple[float, float]) -> float:
    """Time in which a card's memory delivers the weights of a step: for teacher, student and its backward each, and
    once more with checkpointing, in each micro-batch."""
    student, teacher = kept
    times = student * (3 if layout.checkpointing else 2) + (teacher if job.policy.taught else 0)
    return passes(job, layout) * times * job.itemsize * job.spec.prunable / job.cluster.card.bandwidth


def launch_seconds(spec: ArchSpec) -> float:
    """CPU time of one micro-batch without checkpointing; each expert has three of the seven projections of its own."""
    return spec.layers * LAUNCH_SECONDS * (len(ATTENTION) + spec.experts * len(FFN)) / len(PROJECTIONS)


def step_flops(job: Job, checkpointing: bool, kept: tuple[float, float]) -> float:
    """FLOP of one step over all ranks.

    Per token: 2 per weight of the projections for the teacher's forward, the student's forward and its backward (dx
    only), scaled by the kept shares; causal attention 2·T·H·P forward and 2.5x that backward (FlashAttention); LoRA 2
    per weight forward and 4 backward, 2 of them in the frozen pair; the head three times (both logits, the gradient).
    Checkpointing adds one forward.
    Of experts only those count that the router chooses for a token; as it always chooses as many, nothing is taken off
    for removed units where whole experts are among them.
    """
    spec, config = job.spec, job.config
    student, teacher = (1.0, 1.0) if "experts" in config.gates.units else kept
    layer = 2 * spec.prunable_read
    attention = spec.layers * 2 * config.data.seq_len * spec.heads * spec.head_dim
    trained = 2 * job.lora_parameters
    lora = trained + 2 * job.refit_parameters
    head = 2 * spec.vocab * spec.hidden
    taught = job.policy.taught
    forward = student * (layer + attention + lora)
    backward = student * (layer + 2.5 * attention + lora + trained)
    tutor = teacher * (layer + attention + (lora if job.teaching else 0)) if taught else 0.0
    per_token = tutor + forward * (2 if checkpointing else 1) + backward + head * (3 if taught else 2)
    return per_token * job.tokens


def mean_kept(job: Job) -> tuple[float, float]:
    """(student's, teacher's) kept share of the prunable parameters, averaged over the steps.

    The student follows the schedule; the teacher is the policy's, with one snapshot per interval.
    """
    config, total = job.config, job.steps
    policy = job.policy(job.spec, config.teacher, 1.0, torch.device("cpu"), torch.float32)
    student = teacher = 0.0
    wanted = job.snapshots
    for step in range(total):
        target = job.schedule.target(step)
        policy.observe(step, target, config.sparsity.target)
        student += 1 - target
        teacher += 1 - policy.sparsity(step, total, target)
        grid = (len(policy.snapshots) + 1) * config.teacher.interval
        if len(policy.snapshots) < wanted and target >= grid * (1 - 1e-9):
            policy.snapshots.append(Snapshot(step, target, Gates(), {}, {}))
    return student / total, teacher / total
