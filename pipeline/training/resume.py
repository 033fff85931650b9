"""The state of a running prune stage on disk: enough to go on bit for bit, independent of the number of ranks.

Gate samples and data order are functions of (seed, step), so no random-number state is needed beyond the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nuteprune.config import Config, flatten, read_yaml, to_dict
from nuteprune.errors import UserError
from nuteprune.masks import Gates, MaskSet
from nuteprune.model.lora import Update, joined
from nuteprune.runs.checkpoint import CheckpointError, read_json
from nuteprune.runs.rundir import (
    load_adapter,
    load_gates,
    save_adapter,
    save_config,
    save_gates,
)
from nuteprune.runs.snapshot_files import load_snapshots, pair_tensors, save_snapshots, tensor_pairs
from nuteprune.training.teachers import Teacher

FREE_KEYS = (
    "run_dir", "recipe", "deepspeed", "train.rank_timeout", "train.activation_checkpointing",
    "train.deterministic", "train.micro_batch", "finetune.micro_batch",
)  # fmt: skip
"""Fields that may change between two starts of one run."""
FROZEN = "frozen.safetensors"


def save_state(
    directory: Path, config: Config, masks: MaskSet, multipliers: nn.Module | None, update: Update,
    optimizers: Mapping[str, torch.optim.Optimizer], teacher: Teacher, counters: dict, lender: Path | None = None,
) -> None:  # fmt: skip
    """Write everything `load_state` needs into a directory; `lender`: see `save_snapshots`."""
    save_config(directory / "config.yaml", config)
    save_gates(directory / "gates.safetensors", masks.fixed or Gates(), masks.scores())
    save_adapter(directory / "adapter", update.lora, config, masks.spec)
    if update.frozen:
        save_file(pair_tensors(update.frozen, "frozen"), directory / FROZEN)
    save_snapshots(directory, teacher.snapshots, lender, teacher.rungs)
    tensors = optimizer_tensors(optimizers)
    if multipliers is not None:
        tensors["multipliers"] = multipliers.values.detach().cpu()
    save_file(tensors, directory / "optimizer.safetensors")
    (directory / "state.json").write_text(json.dumps(counters | {"reached": teacher.reached}) + "\n", encoding="utf-8")


def load_state(
    directory: Path, masks: MaskSet, multipliers: nn.Module | None, update: Update,
    optimizers: Mapping[str, torch.optim.Optimizer], teacher: Teacher,
) -> dict[str, float]:  # fmt: skip
    """Restore in place what `save_state` wrote; returns the counters."""
    gates, scores = load_gates(directory / "gates.safetensors")
    with torch.no_grad():
        for kind, value in scores.items():
            masks.log_alpha[kind].copy_(value)
        frozen = tensor_pairs(load_file(directory / FROZEN), "frozen") if update.frozen else {}
        update.load(joined(load_adapter(directory / "adapter"), frozen))
        tensors = load_file(directory / "optimizer.safetensors")
        if multipliers is not None:
            multipliers.values.copy_(tensors.pop("multipliers"))
    restore_optimizers(tensors, optimizers)
    teacher.restore(load_snapshots(directory, rungs=False))
    if gates.as_dict():
        masks.fix(gates)
    counters = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    teacher.reached = counters.pop("reached", None)
    return counters


def check_same_run(run_dir: Path, config: Config, free: tuple[str, ...]) -> None:
    """Raise `UserError` naming the first setting in which a run directory was made with another configuration.

    Args:
        run_dir: the directory; fine where it holds no configuration yet.
        config: the settings of this start.
        free: sections that may differ.
    """
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        return
    old, new = flatten(read_yaml(saved)), flatten(to_dict(config))
    for key, value in new.items():
        if key.split(".")[0] in free or key in FREE_KEYS or old.get(key) == value:
            continue
        was = f"{key}={old[key]!r}" if key in old else f"no {key}, from an older version"
        raise UserError(
            f"run_dir {run_dir} belongs to a run with {was}, not {value!r}: choose another run_dir, "
            "or remove that one to start it anew"
        )


def check_fits(checkpoint: Path, config: Config, free: tuple[str, ...], inputs: Mapping[str, str | None]) -> None:
    """Raise `UserError` where a checkpoint is of a run with other settings, on another base model or other data.

    Args:
        checkpoint: its directory.
        config, free: as of `check_same_run`.
        inputs: fingerprints by name, as the checkpoint's counters hold them under `inputs`.
    """
    check_same_run(checkpoint, config, free)
    known = read_json(checkpoint / "state.json").get("inputs", {})
    for name, value in inputs.items():
        if known.get(name, value) != value:
            raise UserError(
                f"{name} is not what {checkpoint} was trained on, or is packed otherwise by this version: put that "
                "back, or remove the run's directory to start it anew"
            )


def optimizer_tensors(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Optimizer states as tensors named "optimizer.parameter.entry"."""
    tensors = {}
    for name, optimizer in optimizers.items():
        for index, entries in optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                if value is not None:
                    tensors[f"{name}.{index}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def restore_optimizers(tensors: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Restore in place what `optimizer_tensors` gave."""
    for name, optimizer in optimizers.items():
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        restore_optimizer(optimizer, own)


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    # Parameters by number, as in `state_dict`, which a rank with a share of the state does not have.
    groups, known = [], 0
    for group in optimizer.param_groups:
        numbers = range(known, known + len(group["params"]))
        groups.append({**group, "params": list(numbers)})
        known = numbers.stop
    if any(index >= known for index in state):
        raise CheckpointError("optimizer.safetensors belongs to a model with more parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in state.items():
        if any(value.dim() and value.shape != parameters[number].shape for value in entries.values()):
            raise CheckpointError("optimizer.safetensors belongs to a model of other sizes, or an older version")
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _step_beside_parameters(getattr(optimizer, "optim", optimizer))


def _step_beside_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Put the step counts of a fused optimizer on its parameters' devices, where its kernel reads them.

    `ZeroRedundancyOptimizer` loads them to the CPU, on which those of other optimizers belong.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            entries = optimizer.state.get(parameter)
            if entries:
                entries["step"] = entries["step"].to(parameter.device)
