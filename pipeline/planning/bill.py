"""What each stage of a run takes: its steps, and all that comes before, between and behind them.

Each cost has one function, with its formula. Where gathers of weights take part, none hides behind compute.
Units and letters as in costs.py; N tokens, L layers, Q ranks of refit's pair, n ranks of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nuteprune.masks.selection import BATCHES, MEASURED, is_measured
from nuteprune.parallel.sizes import layer_tensors, partitioned, persistence_threshold, total_parameters
from nuteprune.planning.costs import Timing, gather_seconds, launch_seconds, over_links, passes, traffic
from nuteprune.planning.distilling import moments, small_parameters, vocabulary_parameters
from nuteprune.planning.footprint import USABLE
from nuteprune.planning.job import FP32, Job, Layout
from nuteprune.runs.checkpoint import seconds_between
from nuteprune.training import blocks
from nuteprune.training.gram import TOKENS_AT_ONCE
from nuteprune.training.refit import STORED_BYTES, TIMES

IMPORT_SECONDS = 6.0
"""CPU time of importing what prune needs, on the project's machine."""
VARIANTS, COMPILE_SECONDS = 90, 0.35
"""Kernels that a run compiles, and the CPU time of one: `tests/kernels/compile_for_cards.py` compiles 57 for sm_90 with
`every` at one rank of LoRA, 117 for two cards in 41 s; down_proj's other rank adds the 33 that multiply matrices."""
TUNING_SECONDS = 33 * 4 * 0.05
"""Each of those is timed for about four sizes of a model's projections, 25 ms and as much for starting it: assumed."""
STARTING = IMPORT_SECONDS + VARIANTS * COMPILE_SECONDS + TUNING_SECONDS


EXPORT_SECONDS = 6e-9
"""CPU time of one parameter of the intact model in `export`, which folds and checks what it wrote: assumed."""


@dataclass(frozen=True)
class Bill:
    """Seconds of one stage.

    Attributes:
        parts: by name; they add up.
        hidden: by how much the steps are shorter where every gather of weights hides behind compute.
    """

    parts: dict[str, float]
    hidden: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def best(self) -> float:
        return self.total - self.hidden


def pruning_bill(job: Job, layout: Layout, timing: Timing) -> Bill:
    """The seconds of the prune stage in one layout, given those of its steps."""
    steps = job.steps * timing.step
    parts = {
        "loading the model": loading_seconds(job, layout),
        "starting, compiling kernels": STARTING,
        "importance of units": importance_seconds(job, layout),
        "refit: reading the text": reading_seconds(job, layout),
        "refit: fits while units leave": fitting_seconds(job, layout),
        "measuring structures": MEASURED * BATCHES / 4 * timing.step if is_measured(job.config.gates) else 0.0,
        f"{job.steps:,} steps": steps,
        "checkpoints and result": written_seconds(job, checkpoint_bytes(job, timing.step)),
    }
    return Bill({name: seconds for name, seconds in parts.items() if seconds}, job.steps * (timing.step - timing.best))


def distillation_bill(job: Job, layout: Layout, timing: Timing) -> Bill:
    """The seconds of the distill stage in one layout, given those of its steps."""
    count = job.config.distill.steps
    steps = count * timing.step
    parts = {
        "loading both models": loading_seconds(job, layout)
        + job.itemsize * (vocabulary_parameters(job) + small_parameters(job)[1]) / job.cluster.disk,
        "starting, compiling kernels": STARTING,
        "fitting layers": blocks_seconds(job, layout),
        f"{count:,} steps": steps,
        "checkpoints and result": written_seconds(job, distillation_bytes(job, timing.step)),
    }
    return Bill(parts, count * (timing.step - timing.best))


def written_seconds(job: Job, written: dict[str, float]) -> float:
    """Seconds of what a stage writes, and reads again for its hash."""
    return 2 * sum(written.values()) / job.cluster.disk


def export_seconds(job: Job) -> float:
    """The base from the disk, folded on a thread of the CPU, and the small model written and read for its hash."""
    small = vocabulary_parameters(job) + small_parameters(job)[1]
    return (
        IMPORT_SECONDS + job.itemsize * (total_parameters(job.spec) + 2 * small) / job.cluster.disk
        + EXPORT_SECONDS * total_parameters(job.spec)
    )  # fmt: skip


def evaluation_seconds(job: Job) -> float:
    """Both models from the disk and on one card, which decodes what the report measures, a token at a time.

    Speed: two batch sizes, five repeats and two turns to warm up, of `evaluate.new_tokens`; `evaluate.prompts` are
    continued by 64 tokens, eight at a time. A token reads the weights once, from host memory where the card does not
    hold them, and waits for a third of a step's launches. Held-out text is small beside that.
    """
    spec, evaluate, card = job.spec, job.config.evaluate, job.cluster.card
    decoded = 7 * len(evaluate.batch_sizes) * evaluate.new_tokens + math.ceil(evaluate.prompts / 8) * 64
    seconds = IMPORT_SECONDS
    for parameters in (total_parameters(spec), vocabulary_parameters(job) + small_parameters(job)[1]):
        size = job.itemsize * parameters
        rate = card.bandwidth if size <= USABLE * card.memory else card.host
        seconds += size / job.cluster.disk + decoded * max(size / rate, launch_seconds(spec) / 3)
    return seconds


def blocks_seconds(job: Job, layout: Layout) -> float:
    """The fit of the layers (training/blocks.py) on one card, for which the others wait.

    FLOP: 2 a weight of both models for each token of the text, 6 a weight of the small one for each token of a layer's
    steps. AdamW reads and writes 32 bytes a weight and step; a step launches 2/3 of what a layer of pruning does.
    A layer comes from host memory and goes back in float32; under ZeRO-3 the teacher's is gathered, and the result is
    sent to the ranks that own it.
    """
    spec, c = job.spec, job.cluster
    decoder, share = small_parameters(job)[1], 1 - job.config.sparsity.target
    tokens = min(blocks.TOKENS, job.text)
    flop = (
        2 * tokens * (1 + share) * spec.prunable_read
        + 6 * blocks.STEPS * blocks.STEP_TOKENS * share * spec.prunable_read
    )
    launches = blocks.STEPS * launch_seconds(spec) * 2 / 3
    work = max(flop / job.flops + blocks.STEPS * 32 * decoder / c.card.bandwidth, launches)
    moved = 2 * FP32 * decoder / c.card.host
    if c.ranks > 1:
        gathered_once = job.itemsize * spec.prunable if layout.stage == 3 else 0.0
        moved += gather_seconds(*over_links(gathered_once + FP32 * decoder, c), c)
    return work + moved


def loading_seconds(job: Job, layout: Layout) -> float:
    """The model's bytes once from the disk, then to the cards: under ZeRO-3 sent out by rank 0, else by each from its
    node's memory, which holds the file once one rank has read it."""
    size, (intra, inter) = job.itemsize * total_parameters(job.spec), (0.0, 0.0)
    if layout.stage == 3:
        intra, inter = over_links(size, job.cluster)
    return size / job.cluster.disk + size / job.cluster.card.host + gather_seconds(intra, inter, job.cluster)


def importance_seconds(job: Job, layout: Layout) -> float:
    """Forward and backward of the intact model, with gradients of gates alone, on N/n tokens of each rank.

    FLOP of a token: 4 a weight of the projections, 3.5 · 2·T·H·P of causal attention, 4 a weight of the head. Sequences
    go through as many at a time as in a step, one by one where there are experts; each pass gathers what one of a step
    does, and takes two thirds of its launches: there is no teacher.
    """
    spec, config = job.spec, job.config
    if config.gates.init != "importance":
        return 0.0
    tokens = math.ceil(min(config.gates.importance_tokens, job.text) / job.tokens) * job.tokens
    attention = spec.layers * 2 * config.data.seq_len * spec.heads * spec.head_dim
    compute = tokens * (4 * spec.prunable_read + 3.5 * attention + 4 * spec.vocab * spec.hidden)
    at_once = 1 if spec.experts > 1 else layout.micro_batch
    count = math.ceil(tokens / (job.cluster.ranks * config.data.seq_len * at_once))
    moved, part = traffic(job, layout), count / passes(job, layout)
    gathers = part * (gather_seconds(moved.intra, moved.inter, job.cluster) + moved.host / job.cluster.card.host)
    return max(compute / job.cluster.ranks / job.flops + gathers, 2 / 3 * count * launch_seconds(spec))


def reading_seconds(job: Job, layout: Layout) -> float:
    """One pass of refit's N tokens, layer by layer, N/n on each rank, `TOKENS_AT_ONCE` of them at a time.

    FLOP: 2 a weight and token, 2·T·H·P of attention, and in each layer 2·N·F²·9/16 of G, of which the upper triangle is
    computed in eight blocks of columns, in the model's type. Once for each layer: its weights are gathered, G (4·F²
    bytes) is summed over the ranks and copied to its owner's host memory, and the hidden states of the share (s·D·N/n)
    come from there and go back. A third of a step's launches: forward alone.
    """
    spec, card, ranks, tokens = job.spec, job.cluster.card, job.cluster.ranks, job.refit_tokens
    if not tokens:
        return 0.0
    attention = spec.layers * 2 * job.config.data.seq_len * spec.heads * spec.head_dim
    gram = FP32 * spec.ffn**2
    compute = tokens * (2 * spec.prunable_read + attention + spec.layers * 2 * spec.ffn**2 * 9 / 16) / ranks / job.flops
    launches = math.ceil(tokens / ranks / TOKENS_AT_ONCE) * launch_seconds(spec) / 3
    weights = 0.0
    if layout.stage == 3:
        weights = job.itemsize * partitioned(layer_tensors(spec), ranks, persistence_threshold(spec))[0] * spec.layers
    moved = gather_seconds(*over_links(weights, job.cluster, layout.hpz), job.cluster)
    moved += gather_seconds(*over_links(spec.layers * gram, job.cluster), job.cluster)
    stream = 2 * spec.layers * job.itemsize * spec.hidden * tokens / ranks
    own = math.ceil(spec.layers / ranks) * gram + (weights / ranks if layout.offload else 0)
    return max(compute, launches) + moved + (stream + own) / card.host


def fitting_seconds(job: Job, layout: Layout) -> float:
    """`TIMES` fits while units leave, and one when the gates settle; each rank fits the layers that it owns.

    FLOP in float32: F³ once for each layer, to invert G with its ridge; of a fit, with R of the F units gone as the
    schedule has it, Cholesky R³/3, solving and products 3·R²·D + 4·R·D², and 2·R·F·Q for the pair. What is kept of G
    comes from host memory (4·F² bytes), and so does down_proj under ZeRO-3 (s·F·D); the pairs (Q·(F + D) of each layer,
    in the model's type) are summed over the ranks.
    """
    spec, cluster = job.spec, job.cluster
    if not job.refit_sizes:
        return 0.0
    settled = job.schedule.settle
    count = min(TIMES, settled) + 1
    d, f, flops = spec.hidden, spec.ffn, float(spec.ffn**3)
    for number in range(1, count + 1):
        r = f * job.schedule.target(settled * number // count)
        flops += r**3 / 3 + 3 * r**2 * d + 4 * r * d**2 + 2 * r * f * job.config.lora.refit
    copied = count * (FP32 * f**2 + (job.itemsize * f * d if layout.stage == 3 else 0))
    fits = flops / (cluster.card.single * cluster.mfu) + copied / cluster.card.host
    summed = 2 * job.itemsize * job.refit_parameters
    return math.ceil(spec.layers / cluster.ranks) * fits + count * gather_seconds(*over_links(summed, cluster), cluster)


def states_written(job: Job, steps: int, seconds: float, state: float) -> int:
    """Checkpoints of so many bytes that a stage writes before its last step, of so many seconds each."""
    if every := job.config.checkpoint.every:
        return max(0, steps - 1) // every
    return min(max(0, steps - 1), int(steps * seconds / seconds_between(2 * state / job.cluster.disk)))


def checkpoint_bytes(job: Job, seconds: float) -> dict[str, float]:
    """Bytes that a run writes, by part, where a step of pruning takes so many seconds.

    A state: LoRA in float32 and its two moments, the frozen pair in the model's type, and three float32 numbers of each
    gate. Snapshots are written once; those that can teach with their LoRA, and the frozen pairs that they share, of
    which there is one for each fit at most. G, for a restart, where all of it is small (`STORED_BYTES`). The result:
    LoRA and the last pair in one adapter, in float32, and the gates.
    """
    count, teachers = job.snapshots, job.teaching
    gates, frozen = FP32 * job.gate_units, job.refit_parameters
    grams = FP32 * job.spec.layers * job.spec.ffn**2 if frozen else 0
    state = 3 * FP32 * job.lora_parameters + job.itemsize * frozen + 3 * gates
    states = states_written(job, job.steps, seconds, state)
    recorded = teachers * sum(job.teacher_tensors) + (count - teachers) * sum(job.rung_tensors)
    parts = {
        f"states ({states})": states * state,
        f"snapshots ({count}, of which {teachers} can teach)": recorded,
        f"their frozen pairs ({min(count, TIMES)})": min(count, TIMES) * sum(job.frozen_tensors),
        "refit: G": grams if grams <= STORED_BYTES else 0,
        "result": FP32 * (job.lora_parameters + frozen) + 2 * gates,
    }
    return {name: float(size) for name, size in parts.items() if size}


def distillation_state(job: Job) -> float:
    """Bytes of a checkpoint of distillation: the decoder's weights in float32, and their two moments."""
    return (FP32 + moments(job)) * small_parameters(job)[1]


def distillation_bytes(job: Job, seconds: float) -> dict[str, float]:
    """Bytes that distillation of the export writes, by part, where a step takes so many seconds.

    A state behind the fit, and further ones. The result: the small model in the model's type.
    """
    state = distillation_state(job)
    states = 1 + states_written(job, job.config.distill.steps, seconds, state)
    return {
        f"states of distillation ({states})": states * state,
        "distilled model": job.itemsize * (vocabulary_parameters(job) + small_parameters(job)[1]),
    }
