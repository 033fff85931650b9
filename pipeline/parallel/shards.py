"""Loading a model that ZeRO-3 partitions: rank 0 reads one layer at a time, and no rank ever holds the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from nuteprune.arch import ArchSpec, family_of, split_fused, stored
from nuteprune.errors import UserError, first_line
from nuteprune.model.loading import Base, check_whole, untied
from nuteprune.parallel.distributed import World


def load_partitioned(base: Base, world: World, settings: dict) -> PreTrainedModel:
    """The pretrained model with every parameter partitioned over the ranks; collective.

    It is built without weights; then rank 0 reads the embedding, each decoder layer, the last norm and the head in
    turn, and `deepspeed.zero.Init` sends each to all ranks, which keep their share. Only rank 0 reads the files, and
    on top of its share a rank holds one of those modules at a time.

    Args:
        base: the model.
        world: this rank's place; the process group exists.
        settings: complete DeepSpeed settings, stage 3.

    Raises:
        UserError: no safetensors there, or weights are missing or damaged.
    """
    import deepspeed

    with world.together():
        with init_empty_weights(include_buffers=False):
            try:
                model = AutoModelForCausalLM.from_config(
                    base.config, dtype=base.dtype, attn_implementation=base.settings.attention
                )
            except ImportError as error:  # flash attention is a package of its own
                raise UserError(f"model.attention={base.settings.attention}: {first_line(error)}") from None
        for layer in model.model.layers:
            split_fused(layer)
        modules = _in_order(model, base.spec)
        names = {module: name for name, module in model.named_modules()}
        files = _files(base.path) if world.is_main else {}
        stored_as = family_of(base.config).file_name
        if world.is_main:
            wanted = (stored_as(f"{names[m]}.{stored(m, n)[0]}") for m in modules for n, _ in m.named_parameters())
            check_whole(base.path, set(wanted) - files.keys())
            head, embedding = stored_as("lm_head.weight"), stored_as("model.embed_tokens.weight")
            if base.spec.tied and head in files:
                whole = slice(None)
                if not torch.equal(_read(files[head], head, whole), _read(files[embedding], embedding, whole)):
                    raise untied(base.path)
    partitioned: list[nn.Parameter] = []
    for module in modules:
        _materialise(module, names[module], files, stored_as, world)
        if partitioned:  # as DeepSpeed itself adds parameters to a partitioned model: one set of groups for all
            partitioned[0].convert_to_zero_parameters(param_list=list(module.parameters()))
        else:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)
            partitioned = list(module.parameters())
    model.tie_weights()
    for module in model.modules():
        module._buffers |= {name: b.to(world.device) for name, b in module._buffers.items() if b is not None}
    return model


def _in_order(model: PreTrainedModel, spec: ArchSpec) -> list[nn.Module]:
    """The modules that hold all parameters between them, a tied head left out."""
    head = [] if spec.tied else [model.lm_head]
    return [model.model.embed_tokens, *model.model.layers, model.model.norm, *head]


def _materialise(
    module: nn.Module, name: str, files: dict[str, Path], stored_as: Callable[[str], str], world: World
) -> None:
    """Give a module real parameters: those of the files on rank 0, memory to receive them on the others."""
    for key, empty in list(module.named_parameters()):
        if world.is_main:
            own, rows = stored(module, key)
            own = stored_as(f"{name}.{own}")
            value = _read(files[own], own, rows).to(world.device, empty.dtype)
        else:
            value = torch.empty(empty.shape, dtype=empty.dtype, device=world.device)
        owner, _, attribute = key.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))


def _read(file: Path, name: str, rows: slice) -> Tensor:
    # Opened for each tensor: an open file's pages stay in this process's memory once they were read.
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_slice(name)[rows]


def _files(path: str) -> dict[str, Path]:
    """The safetensors file of each weight of a model directory or a hub model."""
    try:
        index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        if index is None:
            file = Path(cached_file(path, SAFE_WEIGHTS_NAME))
            with safe_open(file, framework="pt") as tensors:
                return dict.fromkeys(tensors.keys(), file)
        weights = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        found = {name: Path(cached_file(path, name)) for name in sorted(set(weights.values()))}
        there: set[str] = set()
        for file in found.values():
            with safe_open(file, framework="pt") as tensors:  # reads the header, and whether the file is whole
                there |= set(tensors.keys())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"model.path {path}: ZeRO-3 reads safetensors, and they cannot be read ({first_line(error)})"
        ) from None
    return {weight: found[name] for weight, name in weights.items() if weight in there}
