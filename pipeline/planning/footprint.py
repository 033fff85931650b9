"""Memory of pruning by part, as arithmetic on its sizes: no weights, no device, no measurement.

Every figure follows from `ArchSpec`, the configuration and the cluster. What is assumed stands in the docstring of the
function that assumes it, and in `costs.ASSUMPTIONS`, which the command prints. Units are bytes; GB is 1e9. Letters: D
hidden, F ffn, H heads, R rank, s bytes of an element, n ranks, G GPUs of a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nuteprune.arch import ArchSpec
from nuteprune.model.losses import LayerTerm, OutputTerm, weights
from nuteprune.model.losses.head import CHUNK
from nuteprune.parallel.sizes import layer_tensors, partitioned, persistence_threshold, total_parameters
from nuteprune.planning.job import (
    FP32,
    Job,
    Layout,
)
from nuteprune.training.refit import TIMES

PROCESS_BYTES = 3e9
"""Host memory of a rank before it holds anything: 0.5 GB of imports (measured without a card), the rest, for CUDA and
NCCL, is assumed."""
USABLE = 0.9
"""Share of the GPU's memory that tensors may fill; the rest is for CUDA, NCCL and fragmentation."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part.

    Attributes:
        resident: held all the time.
        phases: on top of it, by what is at work: a layer, the output loss, refit between two steps.
        host: in host memory, at most.
        first: there too, on rank 0 alone.
    """

    resident: dict[str, float]
    phases: dict[str, dict[str, float]]
    host: dict[str, float]
    first: dict[str, float]

    @property
    def fullest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        """Bytes on the GPU at the fullest moment."""
        return sum(self.resident.values()) + sum(self.phases[self.fullest].values())

    def node(self, ranks: int) -> float:
        """Bytes of host memory of the first node, which has as many ranks."""
        return sum(self.host.values()) * ranks + sum(self.first.values())


def memory(job: Job, layout: Layout) -> Memory:
    """Memory of one rank while it prunes."""
    spec, s = job.spec, job.itemsize
    tokens = layout.micro_batch * job.config.data.seq_len
    weights = frozen_weights(job, layout)
    layer, vocabulary = gathered(job, layout)
    per_layer = saved_per_token(job) if layout.checkpointing else 0
    resident = weights | lora_memory(job, layout)
    resident["gates and their optimizer"] = job.gate_units * FP32 * (4 if job.config.gates.optimizer == "adam" else 3)
    step = {
        "activations of the student": activations(job, layout.checkpointing) * tokens,
        "teacher's stream": 2 * s * spec.hidden * tokens,
    }
    phases = {
        "a layer runs": step | {
            # DeepSpeed gathers a layer's tensors into one buffer and copies each out of it.
            "gathered layers (3: at work, prefetched, its buffer)": 3 * layer,
            "one layer at work": (per_layer + working_per_token(job)) * tokens,
        },
        "the output loss runs": step | {
            "gathered head": vocabulary,
            "gathered layer (prefetched)": layer,
            "logits of one KL chunk": logits_chunk(job, tokens),
            "final hidden states and their gradient": (FP32 + 2 * s) * spec.hidden * tokens,
        },
    }  # fmt: skip
    if job.refit_sizes:
        phases["refit fits a layer"] = {"G, what stays of it, its factor and a copy": 4 * FP32 * spec.ffn**2}
    rungs = rung_memory(job)
    first = {"snapshots that are rungs": rungs} if rungs else {}
    return Memory(resident, phases, host_memory(job, layout), first)


def gathered(job: Job, layout: Layout) -> tuple[int, int]:
    """Bytes of a layer and of the output head of the intact model where they are gathered for their work, else 0."""
    spec, s = job.spec, job.itemsize
    return (s * sum(layer_tensors(spec)), s * spec.vocab * spec.hidden) if layout.stage == 3 else (0, 0)


def pinned(tensors: list[int]) -> int:
    """Bytes of host memory that tensors take which a card copies from: torch's allocator of such memory rounds each up
    to a power of two."""
    return sum(1 << (size - 1).bit_length() for size in tensors if size)


def host_memory(job: Job, layout: Layout) -> dict[str, float]:
    """Bytes of host memory of a rank, as if all of it were held at once.

    Teachers: the snapshots that can teach, pinned, with the frozen pairs that they share, at most one of each fit.
    Refit, until the gates settle: G [F, F] in float32 of the layers that a rank owns, under ZeRO-3 their down_proj, and
    while they are measured the hidden states of its share of the text in the model's type.
    """
    spec, s, count = job.spec, job.itemsize, job.teaching
    host = {"process: Python, libraries, CUDA": PROCESS_BYTES}
    if count:
        host[f"teachers ({count} snapshots, pinned)"] = count * pinned(job.teacher_tensors)
        pairs = min(count, TIMES)
        host[f"frozen pairs of teachers ({pairs}, pinned)"] = pairs * pinned(job.frozen_tensors)
    if job.refit_sizes:
        own = math.ceil(spec.layers / job.cluster.ranks)
        host["refit: G of removed units"] = FP32 * spec.ffn**2 * own
        host["refit: down_proj of those layers"] = s * spec.ffn * spec.hidden * own if layout.stage == 3 else 0
        host["refit: hidden states of the text"] = s * spec.hidden * job.refit_tokens / job.cluster.ranks
    host["offloaded weights (pinned)"] = offloaded_weights(job, layout)
    return {name: float(size) for name, size in host.items() if size}


def offloaded_weights(job: Job, layout: Layout) -> int:
    """Bytes of a rank's shard of the frozen weights in host memory; 0 where it is on the card."""
    spec = job.spec
    threshold = persistence_threshold(spec)
    shards = [-(-size // job.cluster.ranks) for size in model_tensors(spec) if size > threshold]
    return pinned([job.itemsize * size for size in shards]) if layout.offload else 0


def rung_memory(job: Job) -> float:
    """Bytes that rank 0 holds on top of it: snapshots that are rungs alone, and their frozen pairs."""
    count, teachers = job.snapshots, job.teaching
    pairs = min(count, TIMES) - min(teachers, TIMES)
    return float((count - teachers) * sum(job.rung_tensors) + pairs * sum(job.frozen_tensors))


def model_tensors(spec: ArchSpec) -> list[int]:
    """Elements of each tensor of the model."""
    return layer_tensors(spec) * spec.layers + [spec.hidden] + [spec.vocab * spec.hidden] * (1 if spec.tied else 2)


def frozen_weights(job: Job, layout: Layout) -> dict[str, float]:
    """Bytes of the frozen weights on a rank's card: whole, or a shard, unless offloaded, and the small tensors whole
    (stage 3)."""
    spec, s, ranks = job.spec, job.itemsize, job.cluster.ranks
    if layout.stage != 3:
        return {"frozen weights (whole)": float(s * total_parameters(spec))}
    gathered, whole = partitioned(model_tensors(spec), ranks, persistence_threshold(spec))
    parts = {} if layout.offload else {f"frozen weights (1/{ranks})": s * gathered / ranks}
    parts["small tensors kept whole"] = float(s * whole)
    if layout.hpz:
        parts[f"frozen weights, hpZ (1/{job.cluster.gpus_per_node})"] = s * gathered / job.cluster.gpus_per_node
    return parts


def lora_memory(job: Job, layout: Layout) -> dict[str, float]:
    """Bytes of LoRA on a rank (engine.py).

    float32 weights and gradients whole, and the two AdamW moments, which ZeRO spreads over the ranks. Copies in the
    compute type of it and of refit's frozen pair: the student's; the active teacher's; in bfloat16 the next one's,
    which is fetched ahead.
    """
    count, s = job.lora_parameters, job.itemsize
    teachers = s + 2 if job.teaching else 0
    return {
        "LoRA weights": FP32 * count,
        "LoRA in compute type (student, teachers)": ((s if s != FP32 else 0) + teachers) * count,
        "frozen pairs of refit (student's, teachers')": (s + teachers) * job.refit_parameters,
        "LoRA gradient": FP32 * count,
        "LoRA moments": 2 * FP32 * count / (job.cluster.ranks if layout.stage else 1),
    }


def saved_per_token(job: Job) -> float:
    """Bytes per token that autograd keeps for one student layer without checkpointing.

    The norms' float32 inputs (4D each); the normed inputs of q/k/v and gate/up (2sD); q, k, v after the rotation, the
    attention's output and log-sum-exp; gate, up, silu(gate) and their product (4sF); the rank-R products of LoRA. With
    hidden or layer gates the outputs of o and down as well (2sD); with eager attention its probabilities. Qwen3 keeps
    float32 q and k for their norms. Where a router chooses k experts, the FFN's part is kept for each of them, their
    outputs (ksD) and the tokens' order (24k).
    """
    spec, s, config = job.spec, job.itemsize, job.config
    queries, values = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    size: float = (
        FP32 * len(spec.norms) * spec.hidden
        + 2 * s * spec.hidden
        + s * (2 * queries + 2 * values)
        + FP32 * spec.heads
        + 4 * s * spec.ffn * spec.top_k
    )
    if spec.experts > 1:
        size += (s * spec.hidden + 24) * spec.top_k
    size += s * config.lora.rank * len(config.lora.targets)
    if spec.qk_norm:
        size += FP32 * (queries + values)
    if {"hidden", "layers"} & set(config.gates.units):
        size += 2 * s * spec.hidden
    if config.model.attention == "eager":
        size += probabilities(job)
    return size


def probabilities(job: Job) -> float:
    """Bytes per token that eager attention keeps: probabilities [H, T] in float32 and in the compute type, and repeated
    keys and values."""
    spec, s = job.spec, job.itemsize
    repeated = 2 * s * spec.head_dim * (spec.heads - spec.kv_heads)
    return spec.heads * job.config.data.seq_len * (FP32 + (s if s != FP32 else 0)) + repeated


def activations(job: Job, checkpointing: bool) -> float:
    """Bytes per token kept from forward to backward over all layers.

    Each layer keeps what `saved_per_token` counts, or only its input (sD) when it is recomputed; and what
    the layer terms keep. The teacher's own forward keeps nothing.
    """
    spec, config = job.spec, job.config
    layer = job.itemsize * spec.hidden if checkpointing else saved_per_token(job)
    terms = weights(config.loss, job.policy.taught)
    layer += FP32 * spec.hidden * sum(term.kept for term in terms if isinstance(term, LayerTerm))
    return spec.layers * layer


def working_per_token(job: Job) -> float:
    """Bytes per token that come and go inside one layer: three FFN-wide and four hidden-wide gradients (or the
    teacher's own activations, which are no more), and two float32 copies of the stream. Of k experts one after the
    other, with the inputs and outputs of all k at once."""
    spec, s = job.spec, job.itemsize
    routed = 3 * spec.hidden * spec.top_k if spec.experts > 1 else 0
    return s * (3 * spec.ffn + 4 * spec.hidden + routed) + 2 * FP32 * spec.hidden


def logits_chunk(job: Job, tokens: int) -> float:
    """Bytes of the full-vocabulary float32 tensors alive at once in `losses/head.py`: the student's logits, and what
    each output term has beside them."""
    terms = weights(job.config.loss, job.policy.taught)
    copies = 1 + sum(term.copies for term in terms if isinstance(term, OutputTerm))
    return copies * FP32 * min(CHUNK, tokens) * job.spec.vocab
