"""Memory of one pruning run by part, as arithmetic on its sizes: no weights, no device, no measurement.

Every figure follows from `ArchSpec`, the configuration and the cluster. What is assumed stands in the docstring of the
function that assumes it, and in `costs.ASSUMPTIONS`, which the command prints. Units are bytes; GB is 1e9. Letters: D
hidden, F ffn, H heads, R rank, s bytes of an element, n ranks, G GPUs of a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nuteprune.arch import ArchSpec
from nuteprune.config import Config, ConfigError
from nuteprune.masks import gated_kinds, unit_shape
from nuteprune.masks.schedule import warmup_steps
from nuteprune.parallel.sizes import (
    layer_tensors,
    partitioned,
    persistence_threshold,
    projection_shapes,
    total_parameters,
)

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
FP32 = 4
USABLE = 0.9
"""Share of the GPU's memory that tensors may fill; the rest is for CUDA, NCCL and fragmentation."""


@dataclass(frozen=True)
class Cluster:
    """The machines, as the flags give them.

    Args:
        nodes, gpus_per_node: counts.
        gpu_memory: bytes of one GPU.
        intra, inter, host: bytes/s one way per GPU: to its neighbours in the node, through its NIC, to host memory.
        flops: peak FLOP/s of one GPU in the model's type.
        mfu: share of the peak that the matrix products reach.
    """

    nodes: int
    gpus_per_node: int
    gpu_memory: float
    intra: float
    inter: float
    host: float
    flops: float
    mfu: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Layout:
    """What can be turned on to make a run fit.

    Args:
        stage: ZeRO stage: 2 keeps the frozen weights whole on each rank, 3 partitions them.
        micro_batch: sequences of one forward pass on a rank.
        checkpointing: recompute each student layer in the backward pass.
        offload: the rank's shard of the frozen weights lives in host memory (stage 3).
        hpz: a second copy of the frozen weights is partitioned inside each node (stage 3).
    """

    stage: int
    micro_batch: int
    checkpointing: bool = False
    offload: bool = False
    hpz: bool = False


@dataclass(frozen=True)
class Job:
    """A run to be planned: its architecture, configuration and cluster."""

    spec: ArchSpec
    config: Config
    cluster: Cluster

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the frozen weights and activations."""
        return ITEMSIZE[self.config.model.dtype]

    @property
    def local_batch(self) -> int:
        """Sequences of one rank and step; raises `ConfigError` if the ranks do not divide the batch."""
        batch, ranks = self.config.train.batch_size, self.cluster.ranks
        if batch % ranks:
            above = -(-batch // ranks) * ranks
            raise ConfigError(
                f"train.batch_size {batch} cannot be split over {ranks} ranks "
                f"({self.cluster.nodes} x {self.cluster.gpus_per_node}): set train.batch_size={above}"
            )
        return batch // ranks


def lora_sizes(job: Job) -> list[int]:
    """Elements of each LoRA matrix in training of one layer."""
    shapes, lora = projection_shapes(job.spec), job.config.lora
    return [lora.rank * side for name in lora.targets for side in shapes[name]]


def frozen_parameters(job: Job) -> int:
    """Elements of the pairs of `lora.refit`."""
    sides = sum(projection_shapes(job.spec)["down_proj"]) if "down_proj" in job.config.lora.targets else 0
    return job.spec.layers * job.config.lora.refit * sides


def lora_parameters(job: Job) -> int:
    """Elements of all LoRA matrices."""
    return job.spec.layers * sum(lora_sizes(job))


def gate_units(job: Job) -> int:
    """Gates (log-alphas) of the run."""
    kinds = gated_kinds(job.spec, job.config.gates.units)
    return sum(torch.Size(unit_shape(job.spec, kind)).numel() for kind in kinds)


def snapshots(config: Config, total: int) -> int:
    """Teachers recorded over a run: one per interval up to the target, at most one a step of the warm-up."""
    if not config.teacher.from_snapshots:
        return 0
    return min(int(config.sparsity.target / config.teacher.interval + 1e-6), warmup_steps(config, total))


def snapshot_bytes(job: Job) -> int:
    """Host memory of one teacher: LoRA in bfloat16, gates and scores in float32 (teachers.py)."""
    return 2 * lora_parameters(job) + 2 * FP32 * gate_units(job)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part.

    Attributes:
        resident: held through the whole step.
        layer_phase, head_phase: on top of it while a layer runs, and while the output loss is computed.
        host: in host memory.
    """

    resident: dict[str, float]
    layer_phase: dict[str, float]
    head_phase: dict[str, float]
    host: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes on the GPU at the fuller of the two moments."""
        return sum(self.resident.values()) + max(sum(self.layer_phase.values()), sum(self.head_phase.values()))


def memory(job: Job, layout: Layout, total: int) -> Memory:
    """Memory of one rank; `total` is the number of steps, which limits the number of teachers."""
    spec, s = job.spec, job.itemsize
    tokens = layout.micro_batch * job.config.data.seq_len
    weights = frozen_weights(job, layout)
    layer = s * sum(layer_tensors(spec)) if layout.stage == 3 else 0
    vocabulary = s * spec.vocab * spec.hidden if layout.stage == 3 else 0
    saved = activations(job, layout.checkpointing) * tokens
    per_layer = saved_per_token(job) if layout.checkpointing else 0
    resident = {
        **{name: size for name, size in weights.items() if not name.startswith("host")},
        **lora_memory(job),
        "gates and their optimizer": gate_units(job) * FP32 * (4 if job.config.gates.optimizer == "adam" else 3),
        "activations of the student": saved,
        "teacher's stream": 2 * s * spec.hidden * tokens,
    }
    layer_phase = {
        # DeepSpeed gathers a layer's tensors into one buffer and copies each out of it.
        "gathered layers (3: at work, prefetched, its buffer)": 3 * layer,
        "one layer at work": (per_layer + working_per_token(job)) * tokens,
    }
    head_phase = {
        "gathered head": vocabulary,
        "gathered layer (prefetched)": layer,
        "logits of one KL chunk": logits_chunk(job, tokens),
        "final hidden states and their gradient": (FP32 + 2 * s) * spec.hidden * tokens,
    }
    count = snapshots(job.config, total)
    host = {f"teachers ({count} snapshots)": float(count * snapshot_bytes(job))}
    if job.config.lora.refit and "down_proj" in spec.lora_targets:
        # Each rank has the matrices of its layers. Some of them lie on its device while they are measured, between two
        # steps, in the place of activations.
        host["refit of removed units"] = FP32 * spec.ffn**2 * math.ceil(spec.layers / job.cluster.ranks)
    if "host" in weights:
        host["offloaded weights"] = weights["host"]
    return Memory(resident, layer_phase, head_phase, host)


def frozen_weights(job: Job, layout: Layout) -> dict[str, float]:
    """Bytes of the frozen weights on a rank: whole (stage 2), or a shard and the small tensors whole (stage 3)."""
    spec, s, ranks = job.spec, job.itemsize, job.cluster.ranks
    if layout.stage == 2:
        return {"frozen weights (whole)": s * total_parameters(spec)}
    tensors = layer_tensors(spec) * spec.layers + [spec.hidden] + [spec.vocab * spec.hidden] * (1 if spec.tied else 2)
    gathered, whole = partitioned(tensors, ranks, persistence_threshold(spec))
    shard = s * gathered / ranks
    parts = {"host" if layout.offload else f"frozen weights (1/{ranks})": shard, "small tensors kept whole": s * whole}
    if layout.hpz:
        parts[f"frozen weights, hpZ (1/{job.cluster.gpus_per_node})"] = s * gathered / job.cluster.gpus_per_node
    return parts


def lora_memory(job: Job) -> dict[str, float]:
    """Bytes of LoRA on a rank (engine.py).

    float32 weights and gradients whole, their copies in the compute type (student's; the active teacher's; in bfloat16
    the next one's, which is fetched ahead), and a share of the two AdamW moments.
    """
    count, s = lora_parameters(job), job.itemsize
    teachers = s + 2 if job.config.teacher.from_snapshots else 0
    return {
        "LoRA weights": FP32 * count,
        "LoRA in compute type (student, teachers)": ((s if s != FP32 else 0) + teachers) * count,
        "LoRA gradient": FP32 * count,
        "LoRA moments": 2 * FP32 * count / job.cluster.ranks,
        "frozen ranks in compute type (student, teachers)": (s + teachers) * frozen_parameters(job),
    }


def saved_per_token(job: Job) -> float:
    """Bytes per token that autograd keeps for one student layer without checkpointing.

    The norms' float32 inputs (4D each); the normed inputs of q/k/v and gate/up (2sD); q, k, v after the rotation, the
    attention's output and log-sum-exp; gate, up, silu(gate) and their product (4sF); the rank-R products of LoRA. With
    hidden or layer gates the outputs of o and down as well (2sD). Eager attention also keeps probabilities [H, T] in
    float32 and in the compute type, and repeated keys and values. Qwen3 keeps float32 q and k for their norms. Where a
    router chooses k experts, the FFN's part is kept for each of them, their outputs (ksD) and the tokens' order (24k).
    """
    spec, s, config = job.spec, job.itemsize, job.config
    queries, values = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    size = (
        FP32 * len(spec.norms) * spec.hidden
        + 2 * s * spec.hidden
        + s * (2 * queries + 2 * values)
        + FP32 * spec.heads
        + 4 * s * spec.ffn * spec.top_k
    )
    if spec.experts > 1:
        size += (s * spec.hidden + 24) * spec.top_k
    size += s * sum(map(config.lora.rank_of, config.lora.targets))
    if spec.qk_norm:
        size += FP32 * (queries + values)
    if {"hidden", "layers"} & set(config.gates.units):
        size += 2 * s * spec.hidden
    if config.model.attention == "eager":
        size += spec.heads * config.data.seq_len * (FP32 + (s if s != FP32 else 0)) + 2 * s * (queries - values)
    return size


def activations(job: Job, checkpointing: bool) -> float:
    """Bytes per token kept from forward to backward over all layers.

    Each layer keeps what `saved_per_token` counts, or only its input (sD) when it is recomputed; and the float32
    difference to the teacher of its layer term (4D). The teacher's own forward keeps nothing.
    """
    spec, config = job.spec, job.config
    layer = job.itemsize * spec.hidden if checkpointing else saved_per_token(job)
    if config.teacher.mode != "none" and config.loss.layer_weight:
        layer += FP32 * spec.hidden
    return spec.layers * layer


def working_per_token(job: Job) -> float:
    """Bytes per token that come and go inside one layer: three FFN-wide and four hidden-wide gradients (or the
    teacher's own activations, which are no more), and two float32 copies of the stream. Of k experts one after the
    other, with the inputs and outputs of all k at once."""
    spec, s = job.spec, job.itemsize
    routed = 3 * spec.hidden * spec.top_k if spec.experts > 1 else 0
    return s * (3 * spec.ffn + 4 * spec.hidden + routed) + 2 * FP32 * spec.hidden


def logits_chunk(job: Job, tokens: int) -> float:
    """Bytes of the full-vocabulary tensors alive at once in `distill._ChunkedHeadLoss`.

    Three of float32 for KL, two for cross entropy, four for both.
    """
    kl, entropy = job.config.teacher.mode != "none", job.config.teacher.mode == "none" or job.config.loss.label_weight
    copies = (3 if kl else 1) + (1 if entropy else 0)
    return copies * FP32 * min(job.config.loss.chunk, tokens) * job.spec.vocab
