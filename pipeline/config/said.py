"""Settings of a command line that a stage behind pruning would ignore: it takes the pruned run's own, or reads none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nuteprune.config.fields import STAGE_SECTIONS, Config
from nuteprune.config.loading import load_config, said_keys
from nuteprune.config.values import flatten, to_dict
from nuteprune.errors import UserError

OF_PRUNING = ("seed", "data", "sparsity", "gates", "train", "lora", "loss", "teacher")
INSTEAD = {
    "recover": {"train.steps": "recover.steps", "train.epochs": "recover.steps"},
    "finetune": {
        "data.source": "finetune.data", "data.seq_len": "finetune.seq_len", "lora.rank": "finetune.lora_rank",
        "loss.kl_weight": "finetune.distill", "sparsity.target": "finetune.sparsity", "train.lora_lr": "finetune.lr",
        **{f"train.{name}": f"finetune.{name}" for name in ("steps", "epochs", "batch_size", "micro_batch")},
    },
    "export": {"gates.shape": "export.shape", "sparsity.target": "export.sparsity"},
    "distill": {"train.steps": "distill.steps", "train.epochs": "distill.steps"},
    "evaluate": {},
}  # fmt: skip
"""Of each stage what it reads in place of a setting of pruning."""
UNREAD = {
    "finetune": ("loss.label_weight", "loss.layer_weight"),
    "distill": ("train.lora_lr", "train.lora_optimizer", "loss.layer_weight"),
}
"""Of each stage what it does not read of sections that it reads: nothing takes its place."""


def check_said(stage: str, config: Config, overrides: Sequence[str]) -> None:
    """Raise `UserError` for an override that differs from what the run was pruned with, where the stage ignores it.

    Args:
        stage: its name.
        config: all settings of this start.
        overrides: those of the command line, `key.sub=value`.
    """
    file = Path(config.run_dir) / "pruned" / "config.yaml"
    if stage not in INSTEAD or not config.run_dir or not file.is_file():
        return
    own, given = (flatten(to_dict(each)) for each in (load_config(file), config))
    for key in sorted(said_keys(None, overrides)):
        section, instead = key.partition(".")[0], INSTEAD[stage].get(key)
        read = section in STAGE_SECTIONS[stage] and not instead
        if given[key] == own[key] or section not in OF_PRUNING:
            continue
        if key in UNREAD.get(stage, ()):
            raise UserError(f"{key}={given[key]}: {stage} does not read this; leave it out")
        if not read:
            hint = f"{stage} reads {instead}" if instead else "leave it out, or prune anew"
            raise UserError(f"{key}={given[key]}: {stage} takes this from the run, which has {own[key]}; {hint}")
