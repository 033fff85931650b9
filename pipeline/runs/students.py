"""Which student of a finished run is meant: its final one or a snapshot, trained on or not, in which shape."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import ExportConfig, GateConfig, ModelConfig
from nuteprune.errors import UserError
from nuteprune.masks import POINT, Gates, Rounding, fit_shape
from nuteprune.model.layers import LoraWeights
from nuteprune.model.lora import joined, padded
from nuteprune.runs.directories import TUNED, finetune_directory, recover_directory
from nuteprune.runs.fingerprint import check_base
from nuteprune.runs.rundir import Run, load_run
from nuteprune.runs.snapshot import Snapshot
from nuteprune.runs.tuned import load_tuned

log = logging.getLogger(__name__)


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


def open_run(run_dir: str | Path, model: ModelConfig) -> Run:
    """The finished run in `run_dir` on the base model of `model.path`, or where that is empty on the run's own.

    Raises:
        UserError: no finished run there, or another base model than the one that was pruned.
    """
    trained = load_run(run_dir)
    model = model if model.path else trained.config.model
    check_base(model.path, trained.facts.get("base"))
    return replace(trained, config=replace(trained.config, model=model))


def export_gates(asked: ExportConfig, trained: Run) -> GateConfig:
    """The run's settings of its gates, with the shape that the export asks for."""
    own = trained.config.gates
    return own if asked.shape == "as_trained" else replace(own, shape=asked.shape)


def newest_student(asked: ExportConfig, trained: Run, spec: ArchSpec) -> Student:
    """The student that an export asks for: fine-tuned where `source` wants that and it is finished.

    Raises:
        UserError: a sparsity that the run never reached, a shape that cannot hold the structure, or no finished
            fine-tuning where one is asked for.
    """
    student = pruned_student(asked, trained, spec, asked.sparsity)
    directory = finetune_directory(trained.directory, trained.config.sparsity.target, asked.sparsity) / TUNED
    if asked.source == "pruned" or (asked.source == "newest" and not directory.is_dir()):
        return student
    tuned = load_tuned(directory, trained, f"run `nuteprune finetune {trained.directory}`")
    log.info("with the LoRA that was fine-tuned for %d steps: %s", tuned.facts["steps"], directory)
    return _in_shape(asked, trained, spec, replace(student, **tuned._asdict()))


def pruned_student(asked: ExportConfig, trained: Run, spec: ArchSpec, sparsity: float) -> Student:
    """The student at a sparsity (0: the final one): recovered where that is finished, unless the export wants it as
    pruning left it; in the shape that the export asks for."""
    student = snapshot_student(asked, trained, spec, sparsity)
    directory = recover_directory(trained.directory, trained.config.sparsity.target, sparsity) / TUNED
    if asked.source == "pruned" or not directory.is_dir():
        return student
    recovered = load_tuned(directory, trained, f"run `nuteprune recover {trained.directory} --sparsity {sparsity:g}`")
    log.info("recovered for %d steps: %s", recovered.facts["recovered"], directory)
    return _in_shape(asked, trained, spec, replace(student, **recovered._asdict()))


def snapshot_student(asked: ExportConfig, trained: Run, spec: ArchSpec, sparsity: float) -> Student:
    """The student as pruning left it at a sparsity (0: the final one), in the shape that the export asks for."""
    return _in_shape(asked, trained, spec, choose_student(trained, sparsity))


def _in_shape(asked: ExportConfig, trained: Run, spec: ArchSpec, student: Student) -> Student:
    wanted = export_gates(asked, trained)
    gates = fit_shape(spec, student.gates, student.scores, student.target, wanted.shape, Rounding.of(wanted),
                      trained.gates)  # fmt: skip
    return replace(student, gates=gates)


def choose_student(trained: Run, sparsity: float) -> Student:
    """The final student (sparsity 0), or whatever the run has nearest to a sparsity."""
    scaling = trained.config.lora.scaling
    final = Student(trained.gates, trained.scores, trained.lora, scaling, trained.config.sparsity.target, {})
    if sparsity in (0, final.target):
        return final
    rungs: dict[float, Snapshot | None] = {s.sparsity: s for s in trained.snapshots} | {trained.sparsity: None}
    if sparsity > max(rungs) + POINT:
        known = ", ".join(f"{reached:.3f}" for reached in sorted(rungs))
        raise UserError(f"sparsity {sparsity:g}: the run never got there; it has {known}")
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
    return joined(merged, padded(snapshot.frozen, trained.config.lora.refit))
