"""The prune stage: learn gates and LoRA on a frozen base model, taught by the student's own earlier snapshots."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nuteprune.config import Config, LossConfig
from nuteprune.data.batches import BatchStream
from nuteprune.data.prepared import TrainingText
from nuteprune.errors import MachineError, UserError
from nuteprune.masks import POINT, Gates, Kept, MaskSet, check_target, mean_counts, sparsity_of
from nuteprune.masks.schedule import Schedule
from nuteprune.masks.selection import BATCHES
from nuteprune.model.layers import View
from nuteprune.model.loading import read_base
from nuteprune.model.pairing import Losses
from nuteprune.parallel.distributed import World
from nuteprune.parallel.zero import load_paired, zero_settings
from nuteprune.planning.machine import with_micro_batch
from nuteprune.runs.log import no_bar
from nuteprune.runs.rundir import save_run
from nuteprune.training.engine import Engine, Multipliers
from nuteprune.training.importance import initial_log_alpha, taylor_importance
from nuteprune.training.inputs import shared_blocks
from nuteprune.training.loop import release_directory, save_checkpoint, train
from nuteprune.training.preparation import Preparation
from nuteprune.training.refit import Refit
from nuteprune.training.signals import Preempted
from nuteprune.training.teachers import TEACHERS, constant_mode
from nuteprune.training.trainer import Masked

log = logging.getLogger(__name__)

PREPARATION, RUNGS = PASSING = "preparation", "rungs"
"""What a run keeps below its directory until it ends: what was measured before the first step, and rungs that no
checkpoint has yet."""


def run(config: Config) -> Path:
    """Prune `config.model` into `config.run_dir`; returns the directory of the finished student. Raises as `train`."""
    return train(config, Pruning)


def summary(config: Config, result: Path) -> str:
    """What the command line prints at the end."""
    return f"pruned student: {result}\nnext: nuteprune export --config {config.run_dir}/config.yaml"


class Pruning(Masked):
    """Gates, multipliers and LoRA in training, and the bank of teachers."""

    stage = "prune"
    output = "pruned"
    free = ("recover", "finetune", "checkpoint", "tracking", "export", "distill", "evaluate")

    def __init__(self, *parts, refit: Refit | None, **state):
        super().__init__(*parts, **state)
        self.refit = refit

    @classmethod
    def build(cls, config: Config, world: World) -> Pruning:
        """Load the model and data and put a run together, at step 0."""
        with world.together():
            base = read_base(config.model)
            spec = base.spec
            check_target(spec, config.gates, config.sparsity.target, config.lora.targets)
            settings = zero_settings(config, spec, world)
            text = TrainingText(config.run_dir, config.data, base)
        blocks = shared_blocks(text, world, config.train.batch_size)
        with world.together():
            stream = BatchStream(blocks, config.train.batch_size, config.seed, world.rank, world.size)
        schedule = Schedule.of(config, stream.steps_per_epoch)
        config = with_micro_batch(config, spec, world, settings, schedule.total)
        model = load_paired(base, config.lora, world, settings, config.train.activation_checkpointing)
        masks = MaskSet(spec, config.gates).to(world.device)
        multipliers = Multipliers().to(world.device) if config.sparsity.constraint == "lagrangian" else None
        engine = Engine(model, masks, multipliers, schedule, world, bool(config.deepspeed))
        held = config.sparsity.constraint == "projection"  # a Lagrangian may pass its target, and then more teach
        teacher = TEACHERS[config.teacher.mode](
            spec, config.teacher, model.scaling, world.device, model.dtype, config.sparsity.target if held else 1.0,
            Path(config.run_dir) / RUNGS if world.is_main else None,
        )  # fmt: skip
        shown, ranks = config.tracking.progress and world.is_main, config.lora.refit
        refit = Refit(model, ranks, schedule, world, stream, shown) if ranks else None
        log.info("%s, %d prunable parameters, %d blocks of text, %d steps, LoRA's rate %g", spec.family, spec.prunable,
                 len(blocks), schedule.total, engine.peak)  # fmt: skip
        return cls(config, world, model, engine, stream, schedule, masks=masks, teacher=teacher,
                   multipliers=multipliers, refit=refit)  # fmt: skip

    def start(self) -> None:
        """Rank the units in a new run, if not all start alike, and look at the FFN units until gates settle."""
        if self.teacher.rungs:  # what is there is not of this start: a checkpoint has its rungs itself
            shutil.rmtree(self.teacher.rungs, ignore_errors=True)
        if self.masks.fixed is not None:
            return
        store = Preparation(Path(self.config.run_dir) / PREPARATION, self.inputs)
        try:
            if self.step == 0 and self.config.gates.init == "importance":
                self.rank_units(store)
            if self.refit:
                self.refit.measure(self.halt, store)
        except UserError as error:
            if self.world.is_main and not isinstance(error, MachineError) and self.checkpoints.newest() is None:
                shutil.rmtree(store.directory, ignore_errors=True)
                release_directory(self.config)
            raise

    def rank_units(self, store: Preparation) -> None:
        """Give log-alpha its start: from importance on the first batches."""
        importance = store.load("importance")
        if not all(self.world.gather(importance is not None)):
            importance = self.importance()
            with self.world.together():
                if self.world.is_main:
                    store.save("importance", {kind: value.cpu() for kind, value in importance.items()})
        assert importance is not None
        importance = {kind: importance[kind].to(self.world.device) for kind in self.masks.kinds}
        self.masks.restart(initial_log_alpha(self.model.spec, importance, self.config.gates.init_spread))

    def importance(self) -> dict[str, Tensor]:
        """Importance of every unit on the first batches of all ranks."""
        tokens = self.config.train.batch_size * self.config.data.seq_len
        count = math.ceil(min(self.config.gates.importance_tokens / tokens, self.stream.steps_per_epoch))

        def batches() -> Iterator[Tensor]:
            with self.progress_bar("importance", "batch", count) as bar:
                for number in range(count):
                    self.halt()
                    yield self.stream.batch(number)
                    bar.update()

        log.info("measuring the importance of %s on %d tokens", ", ".join(self.masks.kinds), count * tokens)
        importance = taylor_importance(self.model, self.masks.kinds, batches(), self.micro_batch)
        return {kind: self.world.sum(value) for kind, value in importance.items()}

    def train_step(self) -> dict[str, float]:
        """One optimizer step: constraint, teacher, paired forward and backward, update, snapshot."""
        config = self.config
        target = self.constrain()
        expected = float(self.masks.expected_sparsity().detach())
        self.teacher.observe(self.step, expected, config.sparsity.target)
        place = self.step, self.total, expected
        view, teacher_sparsity = self.teacher.view(*place), self.teacher.sparsity(*place)
        metrics = self.accumulate(lambda ids: self.forward(ids, view, target))
        metrics |= self.update(metrics["loss"])
        if config.sparsity.constraint == "projection":
            self.masks.project(target)
        reached = float(self.masks.expected_sparsity().detach())
        if self.refit and self.masks.fixed is None and self.step % self.refit.every == 0:
            self.refit.apply(self.masks.deterministic())
        if self.teacher.records and self.masks.fixed is None and self.teacher.is_due(reached):
            self.record(reached)
        if self.multipliers is not None:
            first, second = self.multipliers.values.tolist()
            metrics |= {"lambda_1": first, "lambda_2": second}
        return metrics | {
            "target_sparsity": target,
            "expected_sparsity": reached,
            "teacher_sparsity": teacher_sparsity,
            "noise": self.masks.noise,
            "teachers": float(sum(s.teaches for s in self.teacher.snapshots)),
            "teacher_bank_mb": self.teacher.nbytes / 1e6,
        }

    def record(self, sparsity: float) -> None:
        """Keep a snapshot of the student."""
        update, fitted = self.model.update, self.step - self.step % self.refit.every if self.refit else 0
        with self.world.together():
            self.teacher.record(self.step, sparsity, self.masks.deterministic(), self.masks.scores(), update.lora,
                                update.frozen, fitted)  # fmt: skip

    def constrain(self) -> float:
        """Set noise and target of this step, settle the gates when their time has come; returns the target sparsity."""
        config, masks = self.config, self.masks
        target = self.schedule.target(self.step)
        masks.noise = self.schedule.noise(self.step)
        before = {kind: la.clone() for kind, la in masks.scores().items()}
        if config.sparsity.constraint == "projection":
            masks.project(target)
        if masks.fixed is None and self.step >= self.schedule.settle:
            try:
                gates = masks.settle(config.sparsity.target, self.measure)
            except Preempted:  # saved as the last step left it, so that the next start does the same again
                masks.restart(before)
                save_checkpoint(self)
                raise
            log.info("step %d: gates settled at sparsity %.4f", self.step, sparsity_of(self.model.spec, gates))
            if self.refit:
                self.refit.apply(gates)
                self.refit.free()
        return target

    @torch.no_grad()
    def measure(self, structures: list[Gates]) -> list[float]:
        """Cross entropy of the student as each structure would leave it, on the next batches, averaged over the ranks.

        Every rank gets the same numbers, and so do two starts of one run.
        """
        model, losses = self.model, []
        batches = [self.stream.batch(self.step + i).to(self.world.device) for i in range(BATCHES)]
        shown = self.config.tracking.progress and self.world.is_main
        for gates in tqdm(structures, "measuring structures", leave=False, disable=no_bar(shown)):
            if self.world.any(bool(self.stop.received)):
                raise Preempted(f"{self.stop.name} at step {self.step}, while structures were measured: saved")
            view = model.student(gates.to(self.world.device))
            total = torch.zeros((), dtype=torch.float64, device=self.world.device)
            for batch in batches:
                for ids in batch.split(self.micro_batch):
                    entropy = model(ids, view, None, LossConfig()).total
                    total += entropy.double() * self.share(ids, batch) / len(batches)
            losses.append(float(self.world.mean(total)))
            log.info("%s: cross entropy %.4f", mean_counts(Kept.of(model.spec, gates)), losses[-1])
        return losses

    def forward(self, ids: Tensor, teacher: View | None, target: float) -> Losses:
        """Losses of one micro-batch, the constraint's penalty included."""
        model = self.model
        losses = model(ids, model.view(self.sample_gates()), teacher, self.config.loss)
        if self.multipliers is not None:
            penalty = self.multipliers.penalty(self.masks.expected_sparsity(), target)
            losses = losses._replace(total=losses.total + penalty)
        return losses

    def sample_gates(self) -> Gates:
        """Gates of this step, a function of (seed, step): the same in every micro-batch, on every rank and start."""
        key = (self.config.seed * 1_000_003 + self.step) * 65_537
        return self.masks.sample(torch.Generator().manual_seed(key % (1 << 63)))

    def progress(self, metrics: dict[str, float]) -> dict[str, str]:
        """Loss, sparsity against its target, and the teacher."""
        sparsity = metrics["teacher_sparsity"]
        return super().progress(metrics) | {
            "sparsity": f"{metrics['expected_sparsity']:.1%}/{metrics['target_sparsity']:.1%}",
            "teacher": f"{sparsity:.1%}" if sparsity else constant_mode(self.teacher.taught),
        }

    def pictures(self) -> dict[str, Tensor]:
        """Kept KV groups, query heads, FFN units and hidden dimensions."""
        spec = self.model.spec
        gates = self.masks.deterministic().full(spec)
        heads = gates.head_gate(spec)
        groups = heads.unflatten(1, (spec.kv_heads, spec.group_size)).amax(2)
        return {"kv_groups": groups, "heads": heads, "ffn": gates.ffn_gate(spec), "hidden": gates.hidden[None]}

    def finish(self) -> Path:
        """Save the finished student and its teachers."""
        spec, masks, config = self.model.spec, self.masks, self.config
        gates = masks.deterministic()
        facts: dict[str, Any] = {
            "sparsity": float(masks.expected_sparsity().detach()),
            "kept_sparsity": sparsity_of(spec, gates),
            "steps": self.total,
            "lora_lr": self.engine.peak,
            "tokens": self.total * config.train.batch_size * config.data.seq_len,
            "skipped_steps": self.bad_total,
            "teachers": [s.sparsity for s in self.teacher.snapshots],
        }
        lora = self.model.update.pairs()
        target = save_run(Path(config.run_dir), config, spec, gates, masks.scores(), lora, self.teacher.snapshots,
                          facts, self.checkpoints.newest(), self.teacher.rungs)  # fmt: skip
        for name in PASSING:
            shutil.rmtree(Path(config.run_dir) / name, ignore_errors=True)
        log.info("pruned to %.2f%%, %d snapshots (%.1f MB): %s", 100 * facts["sparsity"], len(self.teacher.snapshots),
                 self.teacher.nbytes / 1e6, target)  # fmt: skip
        if abs(facts["sparsity"] - config.sparsity.target) > POINT:
            log.warning(
                "that is not the %.2f%% asked for: export makes up the difference by score, with units that the "
                "student has not learned to do without. Give it more train.steps, or sparsity.constraint=projection",
                100 * config.sparsity.target,
            )
        return target
