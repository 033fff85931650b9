"""Any causal language model, to be measured: an export of ours, the base, or somebody else's."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.arch import FAMILIES, ArchSpec
from nuteprune.config import ModelConfig
from nuteprune.errors import UserError, first_line
from nuteprune.exporting.folding import OWN_TYPES
from nuteprune.model.hub import fetch, weight_files
from nuteprune.model.loading import check_attention, check_dtype, check_whole

log = logging.getLogger(__name__)

USABLE = 0.9
"""Share of a device's memory that the weights of a model may fill, the rest is for what is computed with them."""


def weight_bytes(path: str, config: ModelConfig) -> int:
    """Bytes of a model's weights in `config.dtype`, from the sizes of its files; 0 where there are none.

    Files whose type config.json does not name are taken to hold `config.dtype`. A model of the hub is downloaded first:
    before, nothing tells their sizes.
    """
    try:
        folder = fetch(path)
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):
        return 0  # loading it says what is wrong
    wanted = getattr(torch, config.dtype)
    dtype = getattr(torch, str(stored.get("dtype") or stored.get("torch_dtype")), wanted)
    size = sum(file.stat().st_size for file in weight_files(folder))
    return size * wanted.itemsize // dtype.itemsize


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


class Known(NamedTuple):
    """What is known of a model for evaluation before its weights are read.

    Attributes:
        tokenizer: of its own.
        folder: of its files.
        asking: that one of them which asks to run code of its own, empty where none does.
    """

    tokenizer: PreTrainedTokenizerBase
    folder: Path
    asking: str


def read_any(path: str, config: ModelConfig, trust: bool = False) -> Known:
    """A model for evaluation without its weights; arguments and errors as of `load_any`."""
    check_attention(config)
    try:
        folder = fetch(path)
        asking = "" if path == config.path else _asking_for_code(folder)
    except (UserError, OSError, ValueError, AttributeError) as error:
        raise _unloadable(path, error) from error
    if asking and not trust:
        raise UserError(
            f"model {path}: its {asking} asks to run Python code that came with it (auto_map), which may do anything "
            "you can: read that code, then set evaluate.trust_remote_code=true"
        )
    if (spec := _spec(folder)) is not None:
        check_dtype(spec, config.dtype)
    if asking:  # before any of it is
        log.warning("%s brings code of its own (auto_map in its %s), which is run", path, asking)
    try:
        return Known(AutoTokenizer.from_pretrained(path, trust_remote_code=bool(asking)), folder, asking)
    # Foreign files, and perhaps foreign code: whatever goes wrong in a model is told by its name.
    except Exception as error:
        raise _unloadable(path, error) from error


def load_any(
    path: str, config: ModelConfig, trust: bool = False, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Any causal language model in `config.dtype` for evaluation, its tokenizer, and the directory of its files.

    A `per_layer` export brings a modelling file for transformers; here the class of this package is used, never that
    file, which anybody may have changed. The code of a run's base (Phi-3 brings some) is not used either: pruning has
    read the model with transformers' own class.

    Args:
        path: directory or hub id.
        config: type and attention, and which model is the run's base.
        trust: whether Python files that came with the model may run.
        device: the weights are read shard by shard onto it; a model that does not fit is spread over all devices.

    Raises:
        UserError: no whole model or no tokenizer there, code of its own that is not trusted, or a type that its family
            cannot compute in.
    """
    known = read_any(path, config, trust)
    return load_weights(path, config, known, device), known.tokenizer, known.folder


def load_weights(path: str, config: ModelConfig, known: Known, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model of `load_any`, of which `read_any` knows the rest."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, config.dtype), attn_implementation=config.attention,
            trust_remote_code=bool(known.asking), output_loading_info=True,
            device_map=placement(weight_bytes(path, config), torch.device(device)),
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as above
        raise _unloadable(path, error) from error
    check_whole(path, info["missing_keys"])
    return model.eval()


def _unloadable(path: str, error: Exception) -> UserError:
    return UserError(f"cannot load the model '{path}' for evaluation: {first_line(error)}")


def _spec(folder: Path) -> ArchSpec | None:
    """The architecture of a model of a supported family, or of an export of one."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # loading it says what is wrong
        return None
    with contextlib.suppress(ValueError, KeyError, UserError):
        for cls in type(config).__mro__:  # an export's class is made of a stock one
            if (name := getattr(cls, "model_type", None)) in FAMILIES:
                return replace(FAMILIES[name].read(config), family=name)
    return None


def _asking_for_code(folder: Path) -> str:
    """The file of a model that names code of its own for transformers to run; empty where none does, or only ours."""
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        ours = name == "config.json" and facts.get("model_type") in OWN_TYPES
        if facts.get("auto_map") and not ours:
            return name
    return ""
