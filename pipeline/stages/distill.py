"""The distill stage: the weights of an exported model's decoder learn from the intact model, on the run's text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nuteprune.config import Config
from nuteprune.distilling.trainer import Distilling, add_gguf
from nuteprune.errors import UserError
from nuteprune.exporting.card import RECORD, check_distilled
from nuteprune.exporting.gguf_quants import check_quantizer
from nuteprune.model.loading import read_base
from nuteprune.model.losses import learns_of_outputs
from nuteprune.parallel.distributed import discover
from nuteprune.runs.checkpoint import read_json
from nuteprune.runs.directories import DISTILLED, distill_directory
from nuteprune.runs.rundir import Run
from nuteprune.runs.students import open_run
from nuteprune.training.loop import train


def run(config: Config) -> Path:
    """Distil the exported model of the finished run in `config.run_dir`; returns the directory of the result.

    Raises:
        UserError: no finished run, no export of it, another base model, or a result of another export.
            As `train` otherwise.
    """
    trained = open_run(config.run_dir, config.model)
    export = Path(config.export.output or trained.directory / "export")
    if not (export / RECORD).is_file():
        raise UserError(f"no exported model at {export}: run `nuteprune export {trained.directory}` first")
    record = read_json(export / RECORD)
    check_quantizer(record.get("gguf", "none"))
    if record.get("finetuned"):
        raise UserError(f"{export} is fine-tuned on records, which distill would undo by its text: leave distill out, "
                        f"or export anew with export.source=pruned")  # fmt: skip
    check_distilled(distill_directory(trained.directory) / DISTILLED, export)
    base = read_base(trained.config.model)
    result = train(settings(config, trained), Distilling, trained, base, export)
    if discover().is_main:
        add_gguf(result, export, base)
    return result


def summary(config: Config, result: Path) -> str:
    """What the command line prints at the end."""
    return f"distilled model: {result}\nnext: nuteprune evaluate {config.run_dir}"


def settings(config: Config, trained: Run) -> Config:
    """The run's configuration with what this start says of the stage."""
    old, wanted = trained.config, config.distill
    if not learns_of_outputs(config.loss):
        raise UserError("loss.kl_weight is 0: distill would learn nothing of the intact model; set it")
    steps = wanted.steps or int(trained.facts["steps"])
    return replace(
        old, run_dir=str(distill_directory(trained.directory)), distill=wanted,
        deepspeed=wanted.deepspeed or config.deepspeed, loss=config.loss,
        export=config.export, checkpoint=config.checkpoint, tracking=config.tracking,
        train=replace(config.train, steps=steps, lora_optimizer="scaled"),
    )  # fmt: skip
