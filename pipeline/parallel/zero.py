"""DeepSpeed's part of a run: its settings from a file and the run's own, and a model partitioned by ZeRO-3.

What DeepSpeed partitions is the frozen base model. Gates, multipliers and LoRA are small and stay whole on every rank
(engine.py), so checkpoints do not depend on the number of ranks.
"""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import Config, LoraConfig, deepspeed_path
from nuteprune.errors import UserError
from nuteprune.model.loading import Base, load_model
from nuteprune.model.pairing import PairedDecoderLayer, PairedModel
from nuteprune.parallel.distributed import World, keep_freed_memory
from nuteprune.parallel.shards import load_partitioned
from nuteprune.parallel.sizes import zero3_sizes

_OURS = {
    "optimizer": "the run has its own optimizers: see train.lora_lr and gates.optimizer",
    "scheduler": "the run has its own schedule: see train.lora_optimizer",
    "gradient_clipping": "the run clips LoRA's gradient at a norm of 1",
}
"""Keys of a DeepSpeed file that would do nothing here, and what to do instead."""

_READ_AT_2 = {
    "zero_optimization", "zero_optimization.stage", "train_batch_size", "gradient_accumulation_steps", "bf16", "fp16",
}  # fmt: skip
"""Keys of a stage 2 file that are read, or must say what the run says."""


def read_deepspeed(name: str) -> dict:
    """The DeepSpeed settings of a name in ds_configs/ or a JSON file; raises `UserError` for one that cannot work."""
    path = deepspeed_path(name)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed {path}: not readable as JSON ({error})") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise UserError(f"deepspeed {path}: has no section zero_optimization, which says what is partitioned")
    for key, advice in _OURS.items():
        if key in settings:
            raise UserError(f"deepspeed {path}: remove {key}; {advice}")
    zero = settings["zero_optimization"]
    stage = zero.get("stage")
    if stage not in (2, 3):
        raise UserError(f"deepspeed {path}: zero_optimization.stage must be 2 or 3, got {stage!r}")
    if stage == 2 and (unread := _unread(settings)):
        raise UserError(
            f"deepspeed {path}: remove {', '.join(unread)}: stage 2 is torch's ZeroRedundancyOptimizer here, which "
            "spreads the state of LoRA's AdamW and reads none of it; every rank holds the whole model and all gradients"
        )
    if "offload_optimizer" in zero:
        raise UserError(f"deepspeed {path}: remove offload_optimizer; only LoRA has one, on each rank's device")
    return settings


def _unread(settings: dict) -> list[str]:
    """Keys of a stage 2 file that say something and that nothing reads."""
    zero = {f"zero_optimization.{key}": value for key, value in settings["zero_optimization"].items()}
    return [key for key, value in (settings | zero).items() if key not in _READ_AT_2 and value != "auto"]


def zero_settings(config: Config, spec: ArchSpec, world: World) -> dict | None:
    """The complete DeepSpeed settings of a run: its file, with batch, precision and sizes filled in; None without.

    Raises:
        UserError: the file cannot be used, contradicts the run's configuration, or does not suit the ranks.
    """
    if not config.deepspeed:
        return None
    settings = read_deepspeed(config.deepspeed)
    dtype = config.model.dtype
    # The run drives its own micro-batches, so for DeepSpeed a step is one.
    _fill(settings, "train_batch_size", config.train.batch_size, "train.batch_size")
    _fill(settings, "gradient_accumulation_steps", 1, "train.micro_batch, which sets the forward passes of a step,")
    _fill(settings, "bf16", {"enabled": dtype == "bfloat16"}, f"model.dtype={dtype}")
    _fill(settings, "fp16", {"enabled": False}, "training, which is never in float16,")
    zero = settings["zero_optimization"]
    if zero["stage"] == 3:
        # Otherwise DeepSpeed replaces torch.nn.functional.linear for the whole process.
        zero["memory_efficient_linear"] = False
        for key, size in zero3_sizes(spec).items():
            if zero.get(key, "auto") == "auto":
                zero[key] = size
        offload = zero.get("offload_param")
        if isinstance(offload, dict):
            if offload.get("device") == "nvme":
                raise UserError(f"deepspeed {config.deepspeed}: offload_param to nvme is not supported: use cpu")
            offload.setdefault("pin_memory", world.device.type == "cuda")
        _check_hpz(zero, world)
    _validate(config.deepspeed, zero)
    return settings


def _fill(settings: dict, key: str, value: Any, source: str) -> None:
    if settings.get(key, "auto") not in ("auto", value):
        raise UserError(f"deepspeed: {key} is {settings[key]!r} there, but {source} says {value!r}: remove it there")
    settings[key] = value


def _check_hpz(zero: dict, world: World) -> None:
    """Fill in and check the ranks over which hpZ keeps its second copy of the weights."""
    key = "zero_hpz_partition_size"
    if zero.get(key) == "auto":
        zero[key] = world.local_size
    size = zero.get(key, 1)
    if isinstance(size, int) and size > 1 and world.size % size:
        raise UserError(f"deepspeed: {key} {size} does not divide the {world.size} ranks: set it to those of a node")


def _validate(name: str, zero: dict) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"deepspeed {name}: zero_optimization.{key}: {first['msg']}") from None


def load_paired(
    base: Base, lora: LoraConfig, world: World, settings: dict | None, checkpointing: bool = False
) -> PairedModel:
    """The frozen base model, wrapped, with fresh LoRA: whole on this rank, or partitioned by ZeRO-3; collective.

    Args:
        base: the model.
        lora: rank and targets of LoRA.
        world: this rank's place.
        settings: complete DeepSpeed settings, or None.
        checkpointing: recompute each student layer in the backward pass.
    """
    if settings is None or settings["zero_optimization"]["stage"] != 3:
        with world.together():
            whole = load_model(base, world.device)
        return PairedModel(whole, base.spec, lora, checkpointing)
    quiet()
    if world.size > 1 and world.device.type == "cpu":
        keep_freed_memory(False)
    model = PairedModel(load_partitioned(base, world, settings), base.spec, lora, checkpointing)
    attach(model, settings)
    return model


def attach(model: PairedModel, settings: dict) -> None:
    """Hang ZeRO-3's gathering of weights on the model's forward and backward, which goes on being called directly.

    Each wrapped layer is a leaf: its weights are gathered once for teacher and student in the forward pass, and once in
    the backward pass, whatever is recomputed there.
    """
    import deepspeed

    deepspeed.utils.set_z3_leaf_modules(model, [PairedDecoderLayer])
    # The engine's own forward, backward and step are for models with an optimizer of DeepSpeed's.
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    # In a tuple it does not become a submodule. It must live: its destructor takes the hooks off.
    model.partitioning = (engine,)
    if torch.distributed.get_backend() == "gloo":
        deepspeed.comm.comm.cdb.all_gather_into_tensor = _gather_in_place


class _Handles(list):
    """Collective operations that are waited for together."""

    def wait(self) -> None:
        for work in self:
            work.wait()


def _gather_in_place(
    output_tensor: Tensor, input_tensor: Tensor, group: torch.distributed.ProcessGroup, async_op: bool = False
) -> _Handles:
    """All-gather by a broadcast from each rank: gloo's own fills a second buffer as large as the output, and copies."""
    parts = output_tensor.view(-1).chunk(group.size())
    parts[group.rank()].copy_(input_tensor.view(-1))
    handles = _Handles(
        torch.distributed.broadcast(part, group_src=rank, group=group, async_op=True) for rank, part in enumerate(parts)
    )
    if not async_op:
        handles.wait()
    return handles


def quiet() -> None:
    """Keep DeepSpeed to warnings, and from compiling an operator that nothing here needs.

    Its shared-memory all-reduce for CPUs takes a minute to build, and a build that is killed leaves a lock on which
    later runs wait for ever.
    """
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # torch's, about a call that DeepSpeed makes.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
