"""A model in training that is shared out over the ranks: weights, gradients, and with them the optimizer's state.

torch's FSDP2 does it, as ZeRO-3 does (Rajbhandari et al. 2020, section 5): each layer's weights are gathered for its
forward and its backward pass, and each rank keeps its share of float32 weights, of their averaged gradient and of
whatever an optimizer makes of them. Under ZeRO-2 the gathered weights stay from the forward to the backward pass.

All of it also takes a model that one process holds whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nuteprune.errors import MachineError, first_line
from nuteprune.parallel.distributed import World
from nuteprune.runs.checkpoint import CheckpointError, Facts, facts


def share_out(root: nn.Module, layers: Iterable[nn.Module], world: World, dtype: torch.dtype, again: bool) -> None:
    """Share a model's weights out over the ranks, or make room for all of them on one; `fill` comes next.

    Args:
        root: calls `layers`; what they do not hold it gathers itself, from its forward to its backward pass.
        layers: gather their weights for themselves.
        world: the ranks.
        dtype: of the gathered weights; shares and gradients are float32.
        again: gather a layer's weights once more for its backward pass, instead of keeping them.
    """
    if world.size > 1:
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        empty = {weight for weight in root.parameters() if not weight.numel()}
        for module in (*layers, root):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=again, ignored_params=empty)
    buffers = [buffer.clone() for buffer in root.buffers()]
    root.to_empty(device=world.device)
    for buffer, value in zip(root.buffers(), buffers, strict=True):
        buffer.copy_(value)


@torch.no_grad()
def fill(weights: Mapping[str, Tensor], whole: Mapping[str, Tensor], world: World) -> None:
    """Give weights their values, which rank 0 has by the same names; each rank has its share of them. Collective."""
    for name, weight in weights.items():
        full = torch.empty(weight.shape, dtype=weight.dtype, device=world.device)
        if world.is_main:
            full.copy_(whole[name])
        if isinstance(weight, DTensor):
            weight.copy_(distribute_tensor(full, weight.device_mesh, weight.placements))
        elif weight.numel():
            if world.size > 1:
                torch.distributed.broadcast(full, src=0)
            weight.copy_(full)


@torch.no_grad()
def gathered_weights(model: nn.Module, dtype: torch.dtype, world: World) -> dict[str, Tensor]:
    """A model's weights by name on rank 0, in host memory and of a type; nothing on the others. Collective."""
    found = {}
    for name, weight in model.named_parameters():
        weight = weight.detach().to(dtype)
        full = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if world.is_main:
            found[name] = full.to("cpu", copy=True)
    return found


def write_shares(tensors: Mapping[str, Tensor], directory: Path, world: World) -> Facts:
    """Write tensors, each rank its share, into safetensors files of a new directory; collective.

    Returns:
        of each file what its own rank has read.

    Raises:
        MachineError: the disk is full, or the place cannot be written to.
    """
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    try:
        with _quiet():
            dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise MachineError(f"cannot write {directory}: {_reason(error)}: free space, or use another run_dir") from None
    mine = list(directory.glob(f"shard-{world.rank + 1:05d}-*"))
    read = world.unhurried(lambda: {path.name: facts(path) for path in mine})
    return {name: each for found in world.gather(read) for name, each in found.items()}


def read_shares(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Fill tensors, of this rank its share, with what `write_shares` wrote on as many or other ranks.

    Raises:
        CheckpointError: what is there is of another model, or damaged.
    """
    try:
        with _quiet():
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{directory}: {_reason(error)}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which torch does not warn of a rank that writes or reads by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _reason(error: CheckpointException) -> str:
    """What went wrong on the first rank that failed."""
    cause, _ = next(iter(error.failures.values()))
    return first_line(cause)
