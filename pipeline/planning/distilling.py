"""Memory, traffic and time of distillation: as `footprint` and `costs` for pruning, with their units and letters."""

from __future__ import annotations

from nuteprune.parallel.sizes import total_parameters
from nuteprune.planning.costs import (
    Timing,
    Traffic,
    gather_seconds,
    head_seconds,
    launch_seconds,
    over_links,
    passes,
    traffic,
)
from nuteprune.planning.footprint import (
    PROCESS_BYTES,
    Memory,
    frozen_weights,
    gathered,
    logits_chunk,
    offloaded_weights,
    probabilities,
    working_per_token,
)
from nuteprune.planning.job import FP32, Job, Layout
from nuteprune.training import blocks
from nuteprune.training.gram import TOKENS_AT_ONCE


def distillation_memory(job: Job, layout: Layout) -> Memory:
    """Memory of one rank while the export is distilled (distilling/trainer.py)."""
    spec, s = job.spec, job.itemsize
    tokens = layout.micro_batch * job.config.data.seq_len
    ends, decoder = small_parameters(job)
    layer, vocabulary = gathered(job, layout)
    stream = FP32 if spec.experts > 1 else s  # experts give float32 to one that is narrower
    a_layer = distilled_per_token(job, stream)
    saved, again = (stream * spec.hidden, a_layer) if layout.checkpointing else (a_layer, 0)
    text = s * spec.hidden * min(blocks.TOKENS, job.text)
    step = {
        "activations of the student": spec.layers * saved * tokens,
        "the intact model's output": s * spec.hidden * tokens,
    }
    learned = f"the decoder's gradient and moments (1/{job.cluster.ranks})"
    step[learned] = (FP32 + moments(job)) * decoder / job.cluster.ranks
    phases = {
        "layers are fitted": {
            "gathered layer, and its buffer": 2 * layer,
            "hidden states of the text: the intact model's, the target, the small model's": 3 * text,
            "a layer of the small model, its gradient and moments": 4 * FP32 * decoder / spec.layers,
            "one layer at work": (a_layer + working_per_token(job)) * max(blocks.STEP_TOKENS, TOKENS_AT_ONCE),
        },
        "the intact model runs": {
            learned: step[learned],
            "gathered layers (3: at work, prefetched, its buffer)": 3 * layer,
            "one layer at work": working_per_token(job) * tokens,
            "its stream": 2 * s * spec.hidden * tokens,
        },
        "the output loss runs": step | {
            "gathered head": vocabulary,
            "the small model's head in the model's type": s * ends / (1 if spec.tied else 2) if s != FP32 else 0,
            "logits of one KL chunk": logits_chunk(job, tokens),
            "final hidden states and their gradient": (FP32 + 2 * s) * spec.hidden * tokens,
        },
        "a layer learns": step | {
            "one layer at work": (again + working_per_token(job)) * tokens,
            "the gradient of its weights, also in the model's type": (FP32 + s) * decoder / spec.layers,
        },
    }  # fmt: skip
    return Memory(distillation_weights(job, layout), phases, *distillation_host(job, layout))


def distillation_weights(job: Job, layout: Layout) -> dict[str, float]:
    """Bytes on a rank's card of both models, while the export is distilled.

    Float32 weights of the small model are shared out over the ranks; several gather it in the compute type, two of its
    layers at a time under stage 3, and one keeps the decoder's copy in that type from forward to backward. The intact
    model is held as in pruning.
    """
    spec, ranks = job.spec, job.cluster.ranks
    ends, decoder = small_parameters(job)
    parts = {
        f"small model, float32 (1/{ranks})": FP32 * (ends + decoder) / ranks,
    }
    if ranks > 1 and layout.stage == 3:
        parts["two gathered layers and the ends"] = job.itemsize * (ends + decoder * min(2 / spec.layers, 1))
    elif ranks > 1:
        parts["gathered small model"] = job.itemsize * (ends + decoder)
    elif job.itemsize != FP32:
        parts["its decoder in the model's type"] = job.itemsize * decoder
    return parts | frozen_weights(job, layout)


def distillation_host(job: Job, layout: Layout) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of host memory while the export is distilled, of a rank and on top of it of rank 0: those of the phase in
    which the first node takes more.

    While layers are fitted, rank 0 holds the exported model in float32. A checkpoint takes of each rank its share of
    the decoder's weights and moments twice: copied from the card, and as the bytes of its file.
    """
    cluster = job.cluster
    decoder = small_parameters(job)[1]
    first = {"small model, float32": FP32 * (vocabulary_parameters(job) + decoder)}
    saving = {"a checkpoint's share, copied and as a file": 2 * (FP32 + moments(job)) * decoder / cluster.ranks}
    phases: list[tuple[dict[str, float], dict[str, float]]] = [({}, first), (saving, {})]
    own, alone = max(phases, key=lambda each: Memory({}, {}, *each).node(cluster.gpus_per_node))
    host = {"process: Python, libraries, CUDA": PROCESS_BYTES}
    if offloaded := offloaded_weights(job, layout):
        host["offloaded weights (pinned)"] = float(offloaded)
    return host | own, alone


def distillation_traffic(job: Job, layout: Layout) -> Traffic:
    """Bytes that a step of distillation moves.

    Of each micro-batch: the intact model's weights once under ZeRO-3, the small model's in the compute type (under
    ZeRO-3 for backward again), and its gradient in float32 to the ranks that own it, half of an all-reduce.
    """
    teacher, (ends, decoder) = traffic(job, layout, "distilling"), small_parameters(job)
    several, count = job.cluster.ranks > 1, passes(job, layout)
    student = job.itemsize * (ends + decoder * (2 if layout.stage == 3 else 1)) * count if several else 0.0
    intra, inter = over_links(student, job.cluster)
    reduced = over_links(FP32 * decoder * count if several else 0.0, job.cluster)
    return Traffic(
        teacher.gathered + student, teacher.base, teacher.intra + intra, teacher.inter + inter, teacher.host, *reduced
    )


def distillation_timing(job: Job, layout: Layout) -> Timing:
    """Time of a step of distillation.

    FLOP of a token: 2 a weight of the intact model, 6 of the small one (8 with checkpointing), causal attention of
    both, 6·V·D of the head. The card's memory besides: on one card a copy of the small model in the compute type a
    micro-batch, and once a step, of each weight that a rank owns, twice its gradient, weight and two moments, read and
    written.
    """
    spec, config, c, count = job.spec, job.config, job.cluster, passes(job, layout)
    decoder, moved = small_parameters(job)[1], distillation_traffic(job, layout)
    share = 1.0 if "experts" in config.gates.units else 1 - config.sparsity.target
    attention, again = spec.layers * 2 * config.data.seq_len * spec.heads * spec.head_dim, int(layout.checkpointing)
    intact = 2 * spec.prunable_read + attention
    small = share * ((6 + 2 * again) * spec.prunable_read + (3.5 + again) * attention)
    compute = job.tokens * (intact + small + 6 * spec.vocab * spec.hidden) / c.ranks / job.flops
    read = count * job.itemsize * spec.prunable * (1 + share * (2 + again)) / c.card.bandwidth
    copied = count * (FP32 + job.itemsize) * decoder if c.ranks == 1 and job.itemsize != FP32 else 0.0
    updated = 2 * (4 * FP32 + 2 * moments(job)) * decoder / c.ranks
    return Timing(
        compute=max(compute, read) + head_seconds(job) + (copied + updated) / c.card.bandwidth,
        gather=gather_seconds(moved.intra, moved.inter, c),
        launch=count * launch_seconds(spec) * (4 / 3 if again else 1),
        offload=moved.host / c.card.host,
        reduce=gather_seconds(moved.reduce_intra, moved.reduce_inter, c),
    )


def small_parameters(job: Job) -> tuple[float, float]:
    """Parameters of the small model: of the embedding and head that are its own, and of its decoder.

    Where the hidden size is kept, the intact model's serve both.
    """
    spec, ends = job.spec, vocabulary_parameters(job)
    own = ends if "hidden" in job.config.gates.units else 0
    return own, total_parameters(spec) - ends - job.config.sparsity.target * spec.prunable


def moments(job: Job) -> int:
    """Bytes of AdamW's two moments of a weight, which are kept in bfloat16 where that is the model's type."""
    return 2 * (2 if job.config.model.dtype == "bfloat16" else FP32)


def vocabulary_parameters(job: Job) -> int:
    """Parameters of the embedding and head of the intact model."""
    return job.spec.vocab * job.spec.hidden * (1 if job.spec.tied else 2)


def distilled_per_token(job: Job, stream: int) -> float:
    """Bytes per token that autograd keeps for one layer of the small model, whose own weights are in training.

    `stream`: bytes of an element of its hidden states.

    Of heads and FFN units, as in `saved_per_token`, the share that is kept. Norms keep their inputs in float32 and what
    they make of them. q/k/v and gate/up share their inputs in float32, and in a narrower type each has its
    own. Experts compute in float32.
    """
    spec, s, share = job.spec, job.itemsize, 1 - job.config.sparsity.target
    wide = spec.head_dim * (spec.heads + spec.kv_heads)
    experts = spec.experts > 1
    size: float = (FP32 + stream) * len(spec.norms) * spec.hidden + s * spec.hidden * (2 if s == FP32 else 5)
    size += share * (2 * s * wide + FP32 * spec.heads + 4 * (FP32 if experts else s) * spec.ffn * spec.top_k)
    if experts:
        size += (2 * FP32 * spec.hidden + 24) * spec.top_k
    if spec.qk_norm:
        size += share * (FP32 + s) * wide
    if job.config.model.attention == "eager":
        size += share * probabilities(job)
    return size
