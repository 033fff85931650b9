"""Which student of a finished run is meant, and in which structure: its final one or a snapshot, fine-tuned or not."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import Config, ConfigError, GateConfig, Shape, load_config
from nuteprune.masks import POINT, Gates, Kept, Rounding, select_units, sparsity_of
from nuteprune.model.layers import LoraWeights
from nuteprune.model.lora import joined
from nuteprune.runs.checkpoint import MANIFEST, atomic_directory, read_json, sha256, verify
from nuteprune.runs.fingerprint import check_base
from nuteprune.runs.rundir import (
    DAMAGED,
    Run,
    load_adapter,
    load_gates,
    load_run,
    reason,
    save_adapter,
    save_config,
    save_gates,
)
from nuteprune.runs.snapshot import Snapshot

log = logging.getLogger(__name__)

SUBLAYERS = ("attn_sublayers", "ffn_sublayers")
TUNED = "tuned"
"""Name of the fine-tuned student below `finetune_directory`."""


@dataclass(frozen=True)
class Student:
    """A pruned model over the base weights.

    Attributes:
        gates, scores: gates and log-alpha of the final student or of a snapshot.
        lora: its LoRA; of a snapshot as from `rung_lora`.
        scaling: LoRA alpha / rank.
        target: sparsity wanted.
        facts: of its fine-tuning (`steps`, `tokens`, `records`, …); empty where there was none.
    """

    gates: Gates
    scores: Mapping[str, Tensor]
    lora: LoraWeights
    scaling: float
    target: float
    facts: Mapping


def open_run(config: Config) -> Run:
    """The finished run in `config.run_dir` on the base model of `model.path`, or where that is empty on the run's own.

    Raises:
        ConfigError: no finished run there, or another base model than the one that was pruned.
    """
    trained = load_run(config.run_dir)
    model = config.model if config.model.path else trained.config.model
    check_base(model.path, trained.facts.get("base"))
    return replace(trained, config=replace(trained.config, model=model))


def shape_of(config: Config, trained: Run) -> Shape:
    """The shape that is asked for: `uniform`, `per_layer_ffn` or `per_layer`."""
    return trained.config.gates.shape if config.export.shape == "as_trained" else config.export.shape


def export_gates(config: Config, trained: Run) -> GateConfig:
    """The run's settings of its gates, with the shape and the rounding that the export asks for."""
    own, asked = trained.config.gates, config.export
    return replace(own, shape=shape_of(config, trained), ffn_multiple=asked.ffn_multiple or own.ffn_multiple,
                   hidden_multiple=asked.hidden_multiple or own.hidden_multiple,
                   tensor_parallel=asked.tensor_parallel or own.tensor_parallel)  # fmt: skip


def pruned_student(config: Config, trained: Run, spec: ArchSpec, sparsity: float) -> Student:
    """The student at a sparsity (0: the final one): recovered where that is finished, unless the export wants it as
    pruning left it; in the structure that the export asks for."""
    student = snapshot_student(config, trained, spec, sparsity)
    directory = recover_directory(trained, sparsity) / TUNED
    if config.export.source == "pruned" or not directory.is_dir():
        return student
    again = f"run `nuteprune recover {trained.directory} --sparsity {sparsity:g}`"
    recovered = load_tuned(directory, trained, student.scores, student.target, again)
    log.info("recovered for %d steps: %s", recovered.facts["recovered"], directory)
    return _in_structure(config, trained, spec, recovered)


def snapshot_student(config: Config, trained: Run, spec: ArchSpec, sparsity: float) -> Student:
    """The student as pruning left it at a sparsity (0: the final one), in the structure that the export asks for."""
    return _in_structure(config, trained, spec, choose_student(trained, sparsity))


def _in_structure(config: Config, trained: Run, spec: ArchSpec, student: Student) -> Student:
    asked = export_gates(config, trained)
    gates = structure(spec, student.gates, student.scores, student.target, asked.shape, Rounding.of(asked),
                      trained.gates)  # fmt: skip
    return replace(student, gates=gates)


def newest_student(config: Config, trained: Run, spec: ArchSpec) -> Student:
    """The student that `config.export` asks for: fine-tuned where `export.source` wants that and it is finished.

    Raises:
        ConfigError: a sparsity that the run never reached, a shape that cannot hold the structure, or no finished
            fine-tuning where one is asked for.
    """
    source, sparsity = config.export.source, config.export.sparsity
    student = pruned_student(config, trained, spec, sparsity)
    directory = finetune_directory(trained, sparsity) / TUNED
    if source == "pruned" or (source == "newest" and not directory.is_dir()):
        return student
    again = f"run `nuteprune finetune {trained.directory}`"
    tuned = load_tuned(directory, trained, student.scores, student.target, again)
    log.info("with the LoRA that was fine-tuned for %d steps: %s", tuned.facts["steps"], directory)
    return _in_structure(config, trained, spec, tuned)


def finetune_directory(trained: Run, sparsity: float) -> Path:
    """Where a student of a run is fine-tuned: its checkpoints, logs and result. The target stands for the final one."""
    final = sparsity in (0, trained.config.sparsity.target)
    return trained.directory / ("finetune" if final else f"finetune-{sparsity:g}")


def recover_directory(trained: Run, sparsity: float) -> Path:
    """Where a rung of a run is recovered: its checkpoints, logs and result."""
    return trained.directory / f"recover-{sparsity or trained.config.sparsity.target:g}"


def save_tuned(
    directory: Path, config: Config, trained: Run, spec: ArchSpec, gates: Gates, lora: LoraWeights, facts: dict
) -> Path:
    """Write a fine-tuned or recovered student to `<directory>/tuned`, atomically; `facts` go to tuned.json."""
    with atomic_directory(directory / TUNED) as temporary:
        save_config(temporary / "config.yaml", config)
        save_gates(temporary / "gates.safetensors", gates, {})
        save_adapter(temporary / "adapter", lora, config, spec)
        facts = {**facts, "pruned": sha256(trained.directory / "pruned" / MANIFEST)}
        (temporary / "tuned.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return directory / TUNED


def load_tuned(directory: Path, trained: Run, scores: Mapping[str, Tensor], target: float, again: str) -> Student:
    """Read what `save_tuned` wrote; raises `ConfigError` where it is missing, damaged, or of an earlier pruning.

    `again` says how to make it anew.
    """
    if not directory.is_dir():
        raise ConfigError(f"no finished fine-tuning in {directory.parent}: {again} (finetune.sparsity names a rung)")
    try:
        verify(directory)
        gates, _ = load_gates(directory / "gates.safetensors")
        facts = read_json(directory / "tuned.json")
        lora, config = load_adapter(directory / "adapter"), load_config(directory / "config.yaml").lora
        pruned = facts["pruned"]
    except DAMAGED as error:
        raise ConfigError(f"the student in {directory} is damaged: {reason(error)}; {again}") from None
    if pruned != sha256(trained.directory / "pruned" / MANIFEST):
        raise ConfigError(
            f"{directory} comes from an earlier pruning of this run: {again} with checkpoint.resume=never, or "
            "set export.source=pruned"
        )
    return Student(gates, scores, lora, config.alpha / config.rank, target, facts)


def choose_student(trained: Run, sparsity: float) -> Student:
    """The final student (sparsity 0), or whatever the run has nearest to a sparsity."""
    scaling = trained.config.lora.alpha / trained.config.lora.rank
    final = Student(trained.gates, trained.scores, trained.lora, scaling, trained.config.sparsity.target, {})
    if sparsity in (0, final.target):
        return final
    rungs: dict[float, Snapshot | None] = {s.sparsity: s for s in trained.snapshots} | {trained.sparsity: None}
    if sparsity > max(rungs) + POINT:
        known = ", ".join(f"{reached:.3f}" for reached in sorted(rungs))
        raise ConfigError(f"sparsity {sparsity:g}: the run never got there; it has {known}")
    reached = min(rungs, key=lambda reached: abs(reached - sparsity))
    log.info("from the run's snapshot at sparsity %.3f", reached)
    if (nearest := rungs[reached]) is None:
        return replace(final, target=sparsity)
    # Units that were on their way out had gates below 1. Those that a rung keeps stay, as the final student's do.
    gates = nearest.gates.opened() if trained.gates.settled else nearest.gates
    return Student(gates, nearest.scores, rung_lora(trained, nearest), scaling, sparsity, {})


def rung_lora(trained: Run, snapshot: Snapshot) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA of the student that a snapshot of a run is exported and recovered as.

    Refit's ranks are the snapshot's, which were fitted to its units. The trained ranks are those of the run's end: they
    have learned in all of its steps, the snapshot's only in those before it. They are scaled by the root of the share
    that the snapshot has of the sparsity that they make up for.
    """
    rank, share = trained.config.lora.rank, min(1.0, (snapshot.sparsity / trained.sparsity) ** 0.5)
    merged = {}
    for key, (a_RK, b_NR) in trained.lora.items():
        merged[key] = a_RK[-rank:], share * b_NR[:, -rank:]
    # Runs of earlier versions kept both in one pair.
    older = {key: (a[:-rank], b[:, :-rank]) for key, (a, b) in snapshot.lora.items() if len(a) > rank}
    return joined(merged, snapshot.frozen or older)


def structure(
    spec: ArchSpec, gates: Gates, scores: Mapping[str, Tensor], target: float, shape: Shape,
    rounding: Rounding, like: Gates | None = None,
) -> Gates:  # fmt: skip
    """Gates of the model to export: the run's own if they fit the shape and the target, else chosen by score.

    A unit that stays keeps its gate's value, or gets 1 where the run had removed it.

    Args:
        spec: the architecture.
        gates, scores: the run's gates and log-alpha.
        target: wanted sparsity.
        shape: "uniform", "per_layer_ffn" or "per_layer".
        rounding: to what counts are rounded.
        like: the run's final student, whose kind of structure is taken where one has to be chosen.

    Raises:
        ConfigError: whole sublayers are removed but the shape is uniform, or the target is missed.
    """
    if shape == "uniform" and any((gates.as_dict()[k] == 0).any() for k in SUBLAYERS if k in gates.as_dict()):
        raise ConfigError(
            "the run removed whole sublayers, which no stock model lacks: use export.shape=per_layer_ffn or per_layer"
        )
    before = sparsity_of(spec, gates)
    near = abs(before - target) <= POINT
    kept = Kept.of(spec, gates)
    if near and _fits(kept, shape, rounding):
        return gates
    if shape == "uniform":
        scores = {kind: s for kind, s in scores.items() if kind not in SUBLAYERS}
    chosen = select_units(spec, scores, target, shape, rounding, like).as_dict()
    values = {k: torch.where(z == 0, torch.ones_like(z), z) for k, z in gates.as_dict().items()}
    settled = Gates(**{k: v * chosen[k] if k in chosen else v for k, v in values.items()})
    reached = sparsity_of(spec, settled)
    log.log(logging.INFO if near else logging.WARNING,
            "%d units change to fit the %s shape at %.2f%% (%.2f%% before)",
            kept.changed(Kept.of(spec, settled)), shape, 100 * reached, 100 * before)  # fmt: skip
    if abs(reached - target) > POINT:
        raise ConfigError(
            f"the {shape} shape reaches sparsity {reached:.3f} instead of {target:g}: lower export.ffn_multiple and "
            "export.hidden_multiple, or gate more kinds of units"
        )
    return settled


def _fits(kept: Kept, shape: Shape, rounding: Rounding) -> bool:
    """Whether a shape can hold what is kept."""
    if shape == "per_layer" or not kept.experts_are_alike:
        return kept.experts_are_alike
    every_width = [width for layer in kept.ffn_widths for width in layer]
    counts = [len(units) for units in kept.kv_groups] + every_width
    if any(count % rounding.parallel for count in counts):
        return False
    if shape == "uniform":
        return kept.is_uniform
    widths = all(width % rounding.ffn == 0 or width == kept.spec.ffn for width in every_width)
    return kept.attention_is_alike and widths
