"""The trainer of an exported model: all weights of its decoder learn from the intact model, on the run's text."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nuteprune.config import Config
from nuteprune.data.batches import BatchStream
from nuteprune.data.prepared import TrainingText
from nuteprune.errors import MachineError, UserError, first_line
from nuteprune.exporting.card import CARD, RECORD, trained_card
from nuteprune.exporting.targets.gguf import write_anew
from nuteprune.exporting.targets.stock import SHARD
from nuteprune.masks.schedule import Schedule
from nuteprune.model.loading import Base, in_float32
from nuteprune.model.pairing import Losses
from nuteprune.model.whole import Distillation, Root, without_ends
from nuteprune.parallel.distributed import World
from nuteprune.parallel.sharding import fill, gathered_weights, read_shares, share_out, write_shares
from nuteprune.parallel.zero import load_paired, zero_settings
from nuteprune.planning.machine import with_micro_batch
from nuteprune.runs.checkpoint import MANIFEST, CheckpointError, Facts, atomic_directory, read_json, verify
from nuteprune.runs.directories import DISTILLED
from nuteprune.runs.fingerprint import fingerprint
from nuteprune.runs.rundir import Run, save_config
from nuteprune.training import blocks
from nuteprune.training.inputs import shared_blocks
from nuteprune.training.loop import save_checkpoint
from nuteprune.training.trainer import Trainer
from nuteprune.training.weights import WeightsEngine

log = logging.getLogger(__name__)

RELATIVE_RATE = 1e-3
"""Peak learning rate over the root mean square of the decoder's matrices."""
STALE = ("model*.safetensors*", "*.gguf", MANIFEST)
"""Files of an export that hold its weights, or vouch for them."""
_SHARES = "shares"
"""Of a checkpoint: what `write_shares` wrote."""


class Distilling(Trainer):
    """The decoder of a small model, taught by the intact one with the run's own loss.

    Args:
        parts: of `Trainer`.
        losses: of both models; the student's weights are filled in by `start` or `load`.
        export: the exported model.
        base: the intact one.
    """

    engine: WeightsEngine

    stage = "distill"
    output = DISTILLED
    remedy = "with model.dtype=float32"
    free = ("recover", "finetune", "export", "checkpoint", "tracking", "evaluate")  # `inputs` knows the export
    answers: ClassVar[bool] = False
    """Whether its batches are windows of records."""

    def __init__(self, *parts, losses: Distillation, export: Path, base: Base):
        super().__init__(*parts)
        self.losses, self.student, self.export, self.base = losses, losses.student, export, base
        self.partitioned |= self.world.size > 1
        self.resumed = False
        self.weights: dict[str, Tensor] = {}
        """On rank 0, for `finish`."""

    @classmethod
    def build(cls, config: Config, world: World, trained: Run, base: Base, export: Path) -> Distilling:
        """Load both models and the batches, at step 0."""
        world.unhurried(lambda: check_export(export) if world.is_main else None)
        with world.together():
            zero = zero_settings(config, base.spec, world)
        stream = cls.batches(config, world, trained, base)
        schedule = Schedule.of(config, stream.steps_per_epoch)
        config = with_micro_batch(config, base.spec, world, zero, schedule.total, "distill")
        with world.together():
            student = empty_small(export, config)
        kept = read_json(export / RECORD)["kept"]
        # Where all hidden dimensions stay, and have no gates that could scale them, both models have the same ends.
        shared = len(kept["hidden"]) == base.spec.hidden and "hidden" not in config.gates.units
        if shared:
            without_ends(student)
        teacher = load_paired(base, replace(config.lora, targets=[], refit=0), world, zero)
        root = Root(student)
        again = zero is not None and zero["zero_optimization"]["stage"] == 3
        share_out(root, student.model.layers, world, teacher.dtype, again)
        if not shared:
            student.tie_weights()
        engine = WeightsEngine(student, schedule, teacher.dtype)
        losses = Distillation(root, teacher, kept["layers"], kept["hidden"], config.loss, shared, cls.answers)
        count = sum(weight.numel() for weight in engine.weights.values())
        log.info(
            "%s: %s parameters, %d sequences, %d steps", cls.stage, f"{count:,}", len(stream.blocks), schedule.total
        )
        return cls(config, world, teacher, engine, stream, schedule, losses=losses, export=export, base=base)

    @staticmethod
    def batches(config: Config, world: World, trained: Run, base: Base) -> BatchStream:
        """Blocks of the run's text, behind those that pruning has read."""
        text = shared_blocks(TrainingText(str(trained.directory), config.data, base), world, config.train.batch_size)
        with world.together():
            read = math.ceil(trained.facts["steps"] * trained.config.train.batch_size / config.train.batch_size)
            return BatchStream(text, config.train.batch_size, config.seed, world.rank, world.size, read)

    @cached_property
    def inputs(self) -> dict[str, str | None]:
        """The exported model too."""
        return super().inputs | {"the exported model": fingerprint(str(self.export))}

    def start(self) -> None:
        """Fit the layers whose FFN has lost units, each by itself, in a new run, and save what that took long for."""
        world, named = self.world, dict(self.student.named_parameters())
        if self.resumed:
            frozen = {name: weight for name, weight in named.items() if not weight.requires_grad}
            fill(frozen, self._ends() if frozen and world.is_main else {}, world)
        else:
            whole = world.unhurried(lambda: load_small(self.export, self.config) if world.is_main else None)
            self.fit(whole)
            fill(named, {} if whole is None else dict(whole.named_parameters()), world)
            del whole
        self.engine.peak = self.engine.peak or self.rate()
        log.info("learning rate %g", self.engine.peak)
        if not self.resumed:
            save_checkpoint(self)
            self._forget_fitted()

    def fit(self, whole: PreTrainedModel | None) -> None:
        """Fit the layers that have lost units; `whole`: the small model, on rank 0."""
        length, spec = self.config.data.seq_len, self.model.spec
        count = min(math.ceil(blocks.TOKENS / length), len(self.stream.blocks))
        # What pruning has read comes first: little of what is learned next is to be known before.
        alone = BatchStream(self.stream.blocks, 1, self.config.seed)
        ids = torch.cat([alone.batch(number) for number in range(count)])
        kept = read_json(self.export / RECORD)["kept"]["ffn"]
        narrowed = [len(kept[index]) < spec.ffn_units for index in self.losses.layers]
        log.info("fitting %d layers on %d tokens", sum(narrowed), ids.numel())
        shown = self.config.tracking.progress and self.world.is_main
        saved = self._fitted if self.world.is_main else Path()
        blocks.fit_blocks(self.losses, whole, ids, narrowed, self.world, shown, self.halt, saved)

    def rate(self) -> float:
        """Peak learning rate of a new run. Collective."""
        return relative_rate(self.student, self.world)

    @property
    def _fitted(self) -> Path:
        """Where fitted layers lie until a checkpoint has them; named by what they depend on."""
        known = [*self.inputs.values(), self.config.seed, self.config.data.seq_len, self.config.model.dtype,
                 blocks.TOKENS, blocks.STEPS]  # fmt: skip
        name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
        return Path(self.config.run_dir) / f"fitted-{name}"

    def _forget_fitted(self) -> None:
        if self.world.is_main:
            for directory in Path(self.config.run_dir).glob("fitted-*"):
                shutil.rmtree(directory, ignore_errors=True)

    def _ends(self) -> dict[str, Tensor]:
        """Token embeddings and output head of the export, by name, as its files have them."""
        names = {"model.embed_tokens.weight", "lm_head.weight"}
        found: dict[str, Tensor] = {}
        for file in sorted(self.export.glob("model*.safetensors")):
            with safe_open(file, "pt") as opened:
                found |= {name: opened.get_tensor(name) for name in names.intersection(opened.keys())}
        return found

    def train_step(self) -> dict[str, float]:
        """One optimizer step."""
        metrics = self.accumulate(self.forward)
        return metrics | self.update(metrics["loss"])

    def forward(self, ids: Tensor) -> Losses:
        """Losses of token ids [b, T]."""
        return self.losses(ids)

    def before_save(self) -> Facts:
        """Write weights and moments, each rank its share, beside the checkpoints; returns the facts of the shares."""
        if self.world.is_main:
            shutil.rmtree(self._written, ignore_errors=True)
        try:
            written = write_shares(self.engine.state(), self._written, self.world)
        except MachineError:
            shutil.rmtree(self._written, ignore_errors=True)
            raise
        return {f"{_SHARES}/{name}": each for name, each in written.items()}

    @property
    def _written(self) -> Path:
        """Where shares lie until their checkpoint is whole; `Checkpoints.prune` deletes what a killed one left."""
        return self.checkpoints.directory / ".step-shares"

    def save(self, directory: Path, counters: dict) -> None:
        """Write the counters; the shares are moved there."""
        save_config(directory / "config.yaml", self.config)
        self._written.rename(directory / _SHARES)
        state = counters | {"rate": self.engine.peak}
        (directory / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load(self, directory: Path) -> dict[str, float]:
        """Restore in place what `save` wrote, on each rank by itself; returns the counters."""
        self.resumed = True
        read_shares(self.engine.state(), directory / _SHARES)
        counters = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        self.engine.peak = counters.pop("rate", 0.0)
        return counters

    def before_finish(self) -> None:
        """Gather the weights."""
        dtype = getattr(torch, str(read_json(self.export / "config.json")["dtype"]))
        self.weights = gathered_weights(self.student, dtype, self.world)

    def facts(self) -> dict[str, Any]:
        """What the result's record says of the training."""
        return {"distilled": self.total, "distilled_from": fingerprint(str(self.export))}

    def card_row(self) -> tuple[str, str]:
        """What its card says of it."""
        tokens = self.total * self.config.train.batch_size * self.config.data.seq_len
        return "Distilled", f"all weights of the decoder, {self.total:,} steps, {tokens:,} tokens"

    def finish(self) -> Path:
        """Write the model: the export's files, with these weights."""
        target = Path(self.config.run_dir) / self.output
        weights = self._ends() | self.weights
        record = read_json(self.export / RECORD) | self.facts()
        card = trained_card((self.export / CARD).read_text(encoding="utf-8"), self.card_row())
        with atomic_directory(target) as temporary:
            copy_files(self.export, temporary, STALE)
            with tempfile.TemporaryDirectory(dir=temporary) as saved:
                self.student.save_pretrained(saved, state_dict=weights, max_shard_size=SHARD)
                for file in Path(saved).glob("model*.safetensors*"):
                    file.rename(temporary / file.name)
            if (kind := record.get("gguf", "none")) != "none":
                write_anew(temporary, record["shape"], kind, self.base)
            (temporary / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
            (temporary / CARD).write_text(card, encoding="utf-8")
        self._forget_fitted()
        return target


def copy_files(source: Path, target: Path, left_out: Sequence[str]) -> None:
    """Copy what the files of a directory hold, not their modes: they may be read-only."""
    for file in source.rglob("*"):
        if file.is_file() and not any(fnmatch(file.name, pattern) for pattern in left_out):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def check_export(export: Path) -> None:
    """Raise `MachineError` unless all of an export is there."""
    try:
        verify(export)
    except CheckpointError as error:
        raise MachineError(f"{error}: run `nuteprune export` again") from None


def load_small(export: Path, config: Config) -> PreTrainedModel:
    """The exported model, float32, its weights in training."""
    try:
        student = AutoModelForCausalLM.from_pretrained(
            export, dtype=torch.float32, attn_implementation=in_float32(config.model).attention, trust_remote_code=False
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load the exported model {export}: {first_line(error)}") from None
    return in_training(student, config)


def empty_small(export: Path, config: Config) -> PreTrainedModel:
    """The same without weights, to be shared out."""
    with init_empty_weights(include_buffers=False):
        student = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(export, trust_remote_code=False), dtype=torch.float32,
            attn_implementation=in_float32(config.model).attention, trust_remote_code=False,
        )  # fmt: skip
    return in_training(student, config)


def in_training(student: PreTrainedModel, config: Config) -> PreTrainedModel:
    """The model, its decoder in training; token embeddings and output head stay as they are (docs/experiments.md)."""
    student.get_input_embeddings().requires_grad_(False)
    student.get_output_embeddings().requires_grad_(False)
    student.eval()  # without dropout, as pruning has it
    if config.train.activation_checkpointing:
        with warnings.catch_warnings():  # newer versions of transformers call it activation_checkpointing_enable
            warnings.simplefilter("ignore", FutureWarning)
            student.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in student.model.layers:
            layer.training = True  # asked before it is recomputed
    return student


@torch.no_grad()
def relative_rate(student: PreTrainedModel, world: World) -> float:
    """`RELATIVE_RATE` times the root mean square of the decoder's matrices, to two digits. Collective."""
    squares, count = torch.zeros((), dtype=torch.float64, device=world.device), 0
    for weight in student.model.layers.parameters():
        if weight.dim() > 1 and weight.numel():
            own = weight.to_local() if isinstance(weight, DTensor) else weight
            squares += torch.linalg.vector_norm(own, dtype=torch.float32).double().square() / (
                1 if isinstance(weight, DTensor) else world.size
            )
            count += weight.numel()
    return float(f"{RELATIVE_RATE * math.sqrt(float(world.sum(squares)) / count):.1e}")


def add_gguf(result: Path, export: Path, base: Base) -> None:
    """Write model.gguf of a finished result where the export has got one since, or one of another type."""
    wanted, record = (read_json(each / RECORD) for each in (export, result))
    kind = wanted.get("gguf", "none")
    if kind in ("none", record.get("gguf", "none")):
        return
    with atomic_directory(result) as temporary:
        copy_files(result, temporary, ("*.gguf", MANIFEST))
        shutil.copyfile(export / "Modelfile", temporary / "Modelfile")
        write_anew(temporary, wanted["shape"], kind, base)
        (temporary / RECORD).write_text(json.dumps(record | {"gguf": kind}) + "\n", encoding="utf-8")
