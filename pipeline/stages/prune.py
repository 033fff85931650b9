"""The prune stage: learn gates and LoRA on a frozen base model, taught by the student's own earlier snapshots."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from pipeline.checkpoint import Checkpoints, atomic_directory
from pipeline.config import Config, flatten, to_dict
from pipeline.data import BatchStream, packed_blocks
from pipeline.distributed import World, discover
from pipeline.engine import Engine, Multipliers
from pipeline.importance import initial_log_alpha, taylor_importance
from pipeline.layers import View, build_view
from pipeline.lifecycle import Preempted, Stop, check_directory, claim_directory, is_finished, stop_signals
from pipeline.masks import Gates, MaskSet, check_target, sparsity_of
from pipeline.masks.schedule import noise_at, settle_step, target_at, warmup_steps
from pipeline.models import load_model, load_tokenizer
from pipeline.pairing import PairedModel
from pipeline.resume import load_state, save_state
from pipeline.rundir import save_run
from pipeline.teachers import TeacherBank
from pipeline.tracking import Tracker

log = logging.getLogger(__name__)


class PruneFailed(RuntimeError):
    """The run cannot go on; the message says why and where the last good state is."""


@dataclass
class State:
    """Everything a running prune stage holds."""

    config: Config
    world: World
    model: PairedModel
    masks: MaskSet
    multipliers: Multipliers | None
    engine: Engine
    bank: TeacherBank
    stream: BatchStream
    checkpoints: Checkpoints
    total: int
    step: int = 0
    bad_in_a_row: int = 0
    bad_total: int = 0


def run(config: Config) -> Path:
    """Prune `config.model` into `config.run_dir`; returns the directory of the finished student.

    Started again on the same directory it goes on from the newest checkpoint that verifies, or returns at once if the
    student is finished.

    Raises:
        ConfigError: a mistake in the configuration, the model, the data or the run directory.
        PruneFailed: too many steps in a row were not finite.
        Preempted: SIGTERM or SIGUSR1 came; the state is saved.
    """
    run_dir = check_directory(config)
    if config.checkpoint.resume == "auto" and is_finished(run_dir / "pruned"):
        log.info("already finished: %s", run_dir / "pruned")
        return run_dir / "pruned"
    torch.manual_seed(config.seed)
    state = build(config, discover())
    claim_directory(config, outputs=("checkpoints", "pruned"))
    resume(state)
    with _tracker(state, run_dir) as tracker, stop_signals() as stop:
        if state.step == 0:
            start_gates(state, stop)
        while state.step < state.total:
            began = time.perf_counter()
            metrics = train_step(state)
            report(state, tracker, metrics, time.perf_counter() - began)
            state.step += 1
            every = config.checkpoint.every
            if stop.received or (every and state.step % every == 0 and state.step < state.total):
                save_checkpoint(state)
            if stop.received:
                raise Preempted(
                    f"{stop.received} at step {state.step} of {state.total}: saved; start again with "
                    "checkpoint.resume=auto (the default) to go on"
                )
        return finish(state, tracker, run_dir)


def resume(state: State) -> None:
    """Restore the newest checkpoint that verifies, if there is one."""
    if state.config.checkpoint.resume == "never":
        return
    path, skipped = state.checkpoints.newest_valid()
    state.checkpoints.drop_newer_than(path)
    for reason in skipped:
        log.warning("checkpoint skipped: %s", reason)
    if path is None:
        if skipped:
            log.warning("no checkpoint is whole: starting anew")
        return
    counters = load_state(path, *_parts(state))
    state.step, state.bad_total = counters["step"], counters["bad_total"]
    log.info("resumed at step %d from %s", state.step, path)


def save_checkpoint(state: State) -> None:
    """Write the state after the current step, then drop checkpoints beyond `checkpoint.keep`."""
    counters = {"step": state.step, "bad_total": state.bad_total}
    earlier = next(iter(state.checkpoints.newest_first()), None)
    with atomic_directory(state.checkpoints.path(state.step)) as tmp:
        save_state(tmp, state.config, *_parts(state), counters, earlier)
    state.checkpoints.prune()


def _parts(state: State) -> tuple:
    return state.masks, state.multipliers, state.model.lora(), state.engine.optimizers, state.bank


def summary(config: Config, result: Path) -> str:
    """What the command line prints at the end."""
    return f"pruned student: {result}\nnext: nuteprune export --config {config.run_dir}/config.yaml"


def build(config: Config, world: World) -> State:
    """Load the model and data and put a run together, at step 0."""
    hf_model, spec = load_model(config.model, world.device)
    check_target(spec, config.gates, config.sparsity.target)
    tokenizer = load_tokenizer(config.model.path, spec.vocab)
    blocks = packed_blocks(config.data, tokenizer, spec.vocab)
    stream = BatchStream(blocks, config.train.batch_size, config.seed, world.rank, world.size)
    total = config.train.steps or max(1, round(config.train.epochs * stream.steps_per_epoch))
    model = PairedModel(hf_model, spec, config.lora, config.train.activation_checkpointing)
    masks = MaskSet(spec, config.gates).to(world.device)
    multipliers = Multipliers().to(world.device) if config.sparsity.constraint == "lagrangian" else None
    engine = Engine(model, masks, multipliers, config, total)
    bank = TeacherBank(spec, config.teacher, model.scaling, world.device, model.dtype)
    log.info("%s, %d prunable parameters, %d blocks of text, %d steps", spec.family, spec.prunable, len(blocks), total)
    checkpoints = Checkpoints(Path(config.run_dir) / "checkpoints", config.checkpoint.keep)
    return State(config, world, model, masks, multipliers, engine, bank, stream, checkpoints, total)


def start_gates(state: State, stop: Stop) -> None:
    """Give log-alpha its start: from importance on the first batches, or one drop rate for all (already there)."""
    if state.config.gates.init != "importance":
        return
    count = state.config.gates.importance_batches

    def batches() -> Iterator[Tensor]:
        for number in range(count):
            if stop.received:
                raise Preempted(f"{stop.received} while importance was measured: nothing to save yet, start again")
            yield state.stream.batch(number)

    log.info("measuring the importance of %s on %d batches", ", ".join(state.masks.kinds), count)
    importance = taylor_importance(state.model, state.masks.kinds, batches())
    state.masks.restart(initial_log_alpha(state.model.spec, importance, state.config.gates.init_spread))


def train_step(state: State) -> dict[str, float]:
    """One optimizer step: constraint, teacher, paired forward and backward over the micro-batches, update, snapshot."""
    config, step, total = state.config, state.step, state.total
    target = constrain(state)
    expected = state.masks.expected_sparsity()
    index = state.bank.choose(float(expected.detach()), step, warmup_steps(config, total), total)
    teacher = state.bank.activate(index) if config.teacher.mode != "none" else None
    metrics = accumulate(state, teacher, target)
    metrics |= update(state, metrics["loss"])
    if config.sparsity.constraint == "projection":
        state.masks.project(target)
    reached = float(state.masks.expected_sparsity().detach())
    if config.teacher.mode == "numerous" and state.masks.fixed is None:
        lora = state.model.lora()
        state.bank.record(step, reached, state.masks.deterministic(), state.masks.scores(), lora)
    if state.multipliers is not None:
        first, second = state.multipliers.values.tolist()
        metrics |= {"lambda_1": first, "lambda_2": second}
    return metrics | {
        "target_sparsity": target,
        "expected_sparsity": reached,
        "teacher_sparsity": 0.0 if index is None else state.bank.snapshots[index].sparsity,
        "noise": state.masks.noise,
    }


def constrain(state: State) -> float:
    """Set noise and target of this step, settle the gates when their time has come; returns the target sparsity."""
    config, masks = state.config, state.masks
    target = target_at(config, state.step, state.total)
    masks.noise = noise_at(config, state.step, state.total)
    if config.sparsity.constraint == "projection":
        masks.project(target)
    if masks.fixed is None and state.step >= settle_step(config, state.total):
        masks.settle(config.sparsity.target)
        log.info("step %d: gates settled at sparsity %.4f", state.step, sparsity_of(state.model.spec, masks.fixed))
    return target


def accumulate(state: State, teacher: View | None, target: float) -> dict[str, float]:
    """Forward and backward of one optimizer step's micro-batches; returns the mean loss terms."""
    config, model = state.config, state.model
    batch = state.stream.batch(state.step).to(state.world.device)
    parts = batch.split(config.train.micro_batch or len(batch))
    sums = dict.fromkeys(("loss", "layer_loss", "output_loss", "penalty"), 0.0)
    for number, ids in enumerate(parts):
        view = build_view(model.spec, sample_gates(state, number), model.lora(), model.scaling, model.dtype)
        losses = model(ids, view, teacher, config.loss)
        share = len(ids) / len(batch)
        total = losses.total * share
        penalty = torch.zeros(())
        if state.multipliers is not None:
            penalty = state.multipliers.penalty(state.masks.expected_sparsity(), target) * share
            total = total + penalty
        if total.isfinite():
            state.engine.backward(total)
        sums["loss"] += total.item()
        sums["layer_loss"] += losses.layer.item() * share
        sums["output_loss"] += losses.output.item() * share
        sums["penalty"] += penalty.item()
    return sums


def sample_gates(state: State, micro_batch: int) -> Gates:
    """Gates of one micro-batch: a function of (seed, step, rank, micro-batch), so a resumed run draws the same."""
    key = (state.config.seed * 1_000_003 + state.step) * 65_537 + state.world.rank * 257 + micro_batch
    return state.masks.sample(torch.Generator().manual_seed(key % (1 << 63)))


def update(state: State, loss: float) -> dict[str, float]:
    """Apply the gradients unless the step is not finite; ten bad steps in a row end the run."""
    if math.isfinite(loss):
        result = state.engine.step(state.step)
        skipped, norm = result.skipped, result.grad_norm
    else:
        state.engine.discard()
        skipped, norm = True, float("nan")
    state.bad_in_a_row = state.bad_in_a_row + 1 if skipped else 0
    state.bad_total += skipped
    if skipped:
        log.warning("step %d skipped: loss %g, gradient norm %g (%d in a row)", state.step, loss, norm,
                    state.bad_in_a_row)  # fmt: skip
    if state.bad_in_a_row >= state.config.train.max_bad_steps:
        raise PruneFailed(
            f"{state.bad_in_a_row} steps in a row had a NaN or infinite loss or gradient (last: step {state.step}); "
            f"the last good state is {last_good(state)}; start anew in another run_dir with a lower train.lora_lr, "
            "or with model.dtype=float32"
        )
    return {"grad_norm": norm, "skipped_steps": float(state.bad_total)}


def last_good(state: State) -> str:
    """Where a failed run can go on from."""
    path, _ = state.checkpoints.newest_valid()
    return str(path) if path else "the start of the run (no checkpoint yet)"


def report(state: State, tracker: Tracker, metrics: dict[str, float], seconds: float) -> None:
    """Log a step's scalars, pictures and progress."""
    config = state.config
    tokens = config.train.batch_size * config.data.seq_len
    metrics |= {
        "tokens_per_s": tokens / seconds,
        "peak_memory_gb": peak_memory_gb(state.world.device),
        "teachers": float(len(state.bank.snapshots)),
        "teacher_bank_mb": state.bank.nbytes / 1e6,
    }
    tracker.log(state.step, metrics)
    if state.step % config.tracking.image_every == 0 or state.step == state.total - 1:
        gates = state.masks.deterministic().full(state.model.spec)
        tracker.images(state.step, {"heads": gates.head_gate(state.model.spec), "ffn": gates.ffn_gate()})
    teacher = f"{metrics['teacher_sparsity']:.1%}" if metrics["teacher_sparsity"] else "intact"
    tracker.progress(state.step, {
        "loss": f"{metrics['loss']:.3f}",
        "sparsity": f"{metrics['expected_sparsity']:.1%}/{metrics['target_sparsity']:.1%}",
        "teacher": teacher if config.teacher.mode != "none" else "none",
    })  # fmt: skip


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB: of the accelerator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def finish(state: State, tracker: Tracker, run_dir: Path) -> Path:
    """Save the finished student and its teachers."""
    spec, masks = state.model.spec, state.masks
    gates = masks.deterministic()
    facts = {
        "sparsity": float(masks.expected_sparsity().detach()),
        "kept_sparsity": sparsity_of(spec, gates),
        "steps": state.total,
        "tokens": state.total * state.config.train.batch_size * state.config.data.seq_len,
        "skipped_steps": state.bad_total,
        "teachers": [s.sparsity for s in state.bank.snapshots],
    }
    tracker.hparams(flatten(to_dict(state.config)), {"prune/final_sparsity": facts["sparsity"]})
    lora = {k: tuple(t.detach() for t in pair) for k, pair in state.model.lora().items()}
    target = save_run(run_dir, state.config, spec, gates, masks.scores(), lora, state.bank.snapshots, facts)
    log.info("pruned to %.2f%%, %d teachers (%.1f MB): %s", 100 * facts["sparsity"], len(state.bank.snapshots),
             state.bank.nbytes / 1e6, target)  # fmt: skip
    return target


def _tracker(state: State, run_dir: Path) -> Tracker:
    text = yaml.safe_dump(to_dict(state.config), sort_keys=False)
    return Tracker(run_dir, state.config.tracking, state.total, state.step, state.world.is_main, "prune", text)
