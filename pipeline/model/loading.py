"""Loading a pretrained model of a supported family, with one clear line for everything that can be wrong with it."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nuteprune.arch import ArchSpec, read_spec
from nuteprune.config import ModelConfig
from nuteprune.errors import UserError, first_line
from nuteprune.model.hub import PICKLED, WEIGHTS, fetch, unreachable

log = logging.getLogger(__name__)

USABLE = 0.9
"""Share of a device's memory that the weights of a model may fill, the rest is for what is computed with them."""
OWN_TYPES = "nuteprune_"
"""How the model types begin whose classes are this package's (`exporting.modeling_ragged`), never a directory's."""


def load_tokenizer(path: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: there is none, or it has more tokens than the model's vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model.path {path}: no usable tokenizer there ({first_line(error)})") from None
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"model.path {path}: the tokenizer has {len(tokenizer)} tokens but the model only {vocab_size}: "
            "they do not belong together"
        )
    return tokenizer


def read_config(path: str) -> tuple[PreTrainedConfig, ArchSpec]:
    """transformers' configuration of a model and its `ArchSpec`; raises `UserError` as `load_model` does."""
    if not path:
        raise UserError("model.path is empty: set it to a model directory or a hub id")
    silent = "" if Path(path).exists() else unreachable()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if Path(path).exists():
            raise UserError(f"model.path {path}: no readable config.json there ({first_line(error)})") from None
        raise UserError(
            f"model.path {path}: neither a directory here nor a model the hub would give "
            f"({silent or first_line(error)})"
        ) from None
    try:
        return config, read_spec(config)
    except UserError as error:
        raise UserError(f"model.path {path}: {error}") from None


def check_dtype(spec: ArchSpec, dtype: str, setting: str = "model.dtype") -> None:
    """Raise `UserError` for a type that a family cannot compute in, named by the setting that asks for it."""
    if (refusal := spec.refusal([dtype])) is not None:
        raise UserError(f"{setting}: {refusal}")


def check_attention(config: ModelConfig) -> None:
    """Raise `UserError` for an attention that does not compute in the model's type."""
    if config.attention == "flash_attention_2" and config.dtype == "float32":
        raise UserError("model.attention=flash_attention_2 computes in 16 bits: set model.dtype=bfloat16")


def load_model(config: ModelConfig, device: torch.device | str = "cpu") -> tuple[nn.Module, ArchSpec]:
    """The pretrained model, unmodified, in `config.dtype` on `device`, and its architecture.

    Raises:
        UserError: no such model, unsupported family, or missing, damaged or incomplete weights.
    """
    check_attention(config)
    _, spec = read_config(config.path)
    check_dtype(spec, config.dtype)
    directory = Path(config.path)
    if directory.is_dir() and not any(p for pattern in (WEIGHTS, PICKLED) for p in directory.glob(pattern)):
        raise UserError(f"model.path {config.path}: config.json but no weights (*.safetensors) there")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            config.path, dtype=getattr(torch, config.dtype), attn_implementation=config.attention,
            trust_remote_code=False, output_loading_info=True,
            # Onto a card shard by shard: the ranks of a node would not find room for all their copies in its memory.
            device_map=None if torch.device(device).type == "cpu" else {"": device},
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, UnpicklingError, struct.error, RuntimeError, ValueError, ImportError) as error:
        raise UserError(f"model.path {config.path}: the weights cannot be loaded ({first_line(error)})") from None
    _check_whole(config.path, info)
    return model.to(device), spec


def weight_bytes(path: str, config: ModelConfig) -> int:
    """Bytes of a model's weights in `config.dtype`, from the sizes of its files; 0 where there are none.

    A model of the hub is downloaded first: before, nothing tells their sizes.
    """
    try:
        folder = fetch(path)
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):
        return 0  # loading it says what is wrong
    dtype = getattr(torch, str(stored.get("dtype") or stored.get("torch_dtype") or "float32"), torch.float32)
    files = list(folder.glob(WEIGHTS)) or folder.glob(PICKLED)
    size = sum(file.stat().st_size for file in files)
    return size * getattr(torch, config.dtype).itemsize // dtype.itemsize


def placement(size: int, device: torch.device) -> str | dict | None:
    """transformers' device_map for weights of so many bytes: one card, or, where they do not fit, all of them and the
    host ("auto", by accelerate); None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch, for what comes
    if size <= USABLE * free:
        return {"": device}
    log.info(
        "the weights take %.1f GB and %.1f GB are free on %s: spread over all devices", size / 1e9, free / 1e9, device
    )
    return "auto"


def load_any(
    path: str, config: ModelConfig, trust: bool = False, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Any causal language model in `config.dtype` for evaluation, its tokenizer, and the directory of its files.

    A `per_layer` export brings a modelling file for transformers; here the class of this package is used, never that
    file, which anybody may have changed.

    Args:
        path: directory or hub id.
        config: type and attention.
        trust: whether Python files that came with the model may run.
        device: the weights are read shard by shard onto it; a model that does not fit is spread over all devices.

    Raises:
        UserError: no whole model or no tokenizer there, or code of its own that is not trusted.
    """
    check_attention(config)
    try:
        folder = fetch(path)
        asking = _asking_for_code(folder)
    except (UserError, OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot load the model '{path}' for evaluation: {first_line(error)}") from error
    if asking and not trust:
        raise UserError(
            f"model {path}: its {asking} asks to run Python code that came with it (auto_map), which may do anything "
            "you can: read that code, then set evaluate.trust_remote_code=true"
        )
    if asking:
        log.warning("%s brings code of its own (auto_map in its %s), which is run", path, asking)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=bool(asking))
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, config.dtype), attn_implementation=config.attention,
            trust_remote_code=bool(asking), output_loading_info=True,
            device_map=placement(weight_bytes(path, config), torch.device(device)),
        )  # fmt: skip
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load the model '{path}' for evaluation: {first_line(error)}") from error
    _check_whole(path, info)
    return model.eval(), tokenizer, folder


def _asking_for_code(folder: Path) -> str:
    """The file of a model that names code of its own for transformers to run; empty where none does, or only ours."""
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        ours = name == "config.json" and str(facts.get("model_type")).startswith(OWN_TYPES)
        if facts.get("auto_map") and not ours:
            return name
    return ""


def _check_whole(path: str, info: dict) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"model {path}: {len(missing)} weights are missing, first {missing[0]}")
