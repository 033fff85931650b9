"""A run's first step without its weights, its ranks or a GPU: the real layers, partitioned by DeepSpeed for N ranks.

Tensors are fake (shape, type and device, no memory) and so is the process group, so a 70B model on hundreds of ranks is
tried on a laptop in seconds. The layers of a model have the same shapes, and so have the experts of a layer: a few are
built, and counted for all. What is run is the code of the prune stage: a wrong shape, an option that DeepSpeed refuses
or a target that the gates cannot reach is found here and not after hours in a queue.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from nuteprune.arch import ArchSpec, read_spec, split_fused
from nuteprune.config import Config
from nuteprune.errors import UserError
from nuteprune.masks import Gates, MaskSet, check_target, unit_shape
from nuteprune.model.loading import check_trained_dtype, in_float32
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.distributed import World
from nuteprune.parallel.zero import attach, quiet, zero_settings
from nuteprune.planning.models import read_model
from nuteprune.training.teachers import TEACHERS

STEP_LAYERS = 2
"""Decoder layers that are built and run, each with as many experts as its router chooses."""
GB = 1e9


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Attributes:
        ranks: world size.
        total, share: bytes of the frozen weights, all and rank 0's part of them.
        gathered: bytes of the weights that are partitioned and gathered for use; 0 where every rank holds all.
        gates: shape of the gates by kind.
        lora: number of LoRA parameters.
        layers: what the step ran through, in words.
        seconds: what it took.
    """

    ranks: int
    total: int
    share: int
    gathered: int
    gates: dict[str, tuple[int, ...]]
    lora: int
    layers: str
    seconds: float


def dry_run(config: Config, ranks: int, ranks_per_node: int) -> DryRun:
    """Build the run on `ranks` ranks, `ranks_per_node` on each node, and take a step through its first layers.

    Raises:
        UserError: the configuration, the model or the DeepSpeed settings cannot work on that many ranks.
    """
    import deepspeed

    _on_cpu()
    quiet()
    began = time.perf_counter()
    if config.train.batch_size % ranks:
        raise UserError(f"train.batch_size {config.train.batch_size} cannot be split over {ranks} ranks")
    hf_config, spec = read_model(config.model.path)
    check_target(spec, config.gates, config.sparsity.target, config.lora.targets)
    check_trained_dtype(config.model.dtype)
    few_config, few = _few(hf_config, spec)
    masks = MaskSet(few, config.gates)
    world = World(0, ranks, 0, min(ranks, ranks_per_node))
    with _fake_world(world), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        settings = zero_settings(config, spec, world)
        # Flash attention has the same parameters, and may be installed on the cluster only.
        hf_model = AutoModelForCausalLM.from_config(
            few_config, dtype=getattr(torch, config.model.dtype), attn_implementation=in_float32(config.model).attention
        )
        for layer in hf_model.model.layers:
            split_fused(layer)
        partitioned = settings if settings is not None and settings["zero_optimization"]["stage"] == 3 else None
        if partitioned is not None:
            if "offload_param" in partitioned["zero_optimization"]:  # no disk is needed for tensors without memory
                partitioned["zero_optimization"]["offload_param"] |= {"device": "cpu"}
            deepspeed.zero.Init(module=hf_model, config_dict_or_path=partitioned)
        model = PairedModel(hf_model, few, config.lora, config.train.activation_checkpointing)
        if partitioned is not None:
            attach(model, partitioned)
        total, share, gathered = _bytes(hf_model, spec, few)
        lora = sum(p.numel() for pair in model.lora().values() for p in pair) * spec.layers // few.layers
        _step(model, config, masks, fake, ranks)
    gates = {kind: unit_shape(spec, kind) for kind in masks.kinds}
    layers = f"{few.layers} layers" + (f" of {few.experts} experts" if few.experts > 1 else "")
    return DryRun(ranks, total, share, gathered, gates, lora, layers, time.perf_counter() - began)


def _on_cpu() -> None:
    """Let DeepSpeed place tensors on the CPU, where the ids and gates of a dry run are, also beside a GPU."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    set_accelerator(CPU_Accelerator())


@contextmanager
def _fake_world(world: World) -> Iterator[None]:
    """A process group of `world.size` ranks whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world.size), "LOCAL_RANK": "0"}
    dist.init_process_group("fake", rank=0, world_size=world.size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _few(config: PreTrainedConfig, spec: ArchSpec) -> tuple[PreTrainedConfig, ArchSpec]:
    """The model with the layers and experts that are built."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = min(STEP_LAYERS, spec.layers)
    if spec.experts > 1:
        config.num_local_experts = min(max(2, spec.top_k), spec.experts)
    return config, read_spec(config)


def _bytes(model: nn.Module, spec: ArchSpec, few: ArchSpec) -> tuple[int, int, int]:
    """Bytes of all parameters, of rank 0's share, and of those that are partitioned; of `few`, counted for `spec`."""
    layers, experts = Fraction(spec.layers, few.layers), Fraction(spec.experts, few.experts)
    total = share = gathered = Fraction(0)
    for name, parameter in model.named_parameters():
        whole, own = getattr(parameter, "ds_numel", parameter.numel()), parameter.numel()
        size = parameter.element_size() * (layers if ".layers." in name else 1)
        size *= experts if ".mlp.experts." in name or ".mlp.gate." in name else 1
        if hasattr(parameter, "ds_numel"):
            own = whole if parameter.ds_persist else parameter.ds_tensor.numel()
            gathered += 0 if parameter.ds_persist else whole * size
        total += whole * size
        share += own * size
    return int(total), int(share), int(gathered)


def _step(model: PairedModel, config: Config, masks: MaskSet, fake: FakeTensorMode, ranks: int) -> None:
    """A paired forward and backward of one micro-batch; every gate and LoRA matrix in it must get a gradient."""
    local = config.train.batch_size // ranks
    size = min(config.train.micro_batch or local, local)
    gates = Gates(**{kind: fake.from_tensor(z.detach()).requires_grad_()
                     for kind, z in masks.sample(torch.Generator().manual_seed(0)).as_dict().items()})  # fmt: skip
    # Which units are removed is not known without values: gates multiply, and no unit is left out.
    student = model.student(gates, skip_removed=False)
    ids = torch.zeros(size, config.data.seq_len, dtype=torch.long)
    policy = TEACHERS[config.teacher.mode](model.spec, config.teacher, model.scaling, ids.device, model.dtype)
    model(ids, student, policy.view(0, 1, 0.0), config.loss).total.backward()
    assert all(z.grad is not None for z in gates.as_dict().values())
    assert all(p.grad is not None for pair in model.lora().values() for p in pair)


def text(found: DryRun, config: Config) -> str:
    """What the command prints."""
    lines = [f"dry run of {config.model.path} on {found.ranks} ranks: {found.seconds:.0f} s, a step through "
             f"{found.layers} included"]  # fmt: skip
    how = "partitioned by ZeRO-3" if found.gathered else "whole on every rank"
    lines.append(f"  frozen weights  {found.total / GB:9.3f} GB, {how}: {found.share / GB:.3f} GB a rank")
    if found.gathered:
        lines.append(f"                  {found.gathered / GB:9.3f} GB of them are gathered for use")
    for kind, shape in found.gates.items():
        count = torch.Size(shape).numel()
        lines.append(f"  gates           {count:>9,} {kind} ({' x '.join(map(str, shape))}), alike on every rank")
    lines.append(f"  LoRA            {found.lora:>9,} parameters, alike on every rank")
    return "\n".join(lines)
