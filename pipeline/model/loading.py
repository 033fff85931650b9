"""The base model of a run: its config.json is read once and handed down; one line for everything that can be wrong.

`read_base` looks at everything but the weights; `load_model` reads those whole, `parallel.shards` shares them out.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nuteprune.arch import ArchSpec, read_spec
from nuteprune.config import ModelConfig
from nuteprune.errors import UserError, first_line
from nuteprune.model.hub import PICKLED, WEIGHTS, check_model, fetch


@dataclass(frozen=True)
class Base:
    """A pretrained model of a supported family as its config.json tells of it.

    Attributes:
        settings: its path, and the type and the attention in which it is loaded.
        config: transformers' configuration.
        spec: its architecture.
    """

    settings: ModelConfig
    config: PreTrainedConfig
    spec: ArchSpec

    @property
    def path(self) -> str:
        """Directory or hub id."""
        return self.settings.path

    @property
    def dtype(self) -> torch.dtype:
        """The type in which it is loaded."""
        return getattr(torch, self.settings.dtype)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer; raises `UserError` where there is none, or one with more tokens than the vocabulary.

        Added tokens may lie beyond it, as Gemma's for images do: text that has one is refused when it is packed.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"model.path {self.path}: no usable tokenizer there ({first_line(error)}): copy tokenizer.json "
                "and tokenizer_config.json of the model that it was made from"
            ) from None
        if tokenizer.vocab_size > self.spec.vocab:
            raise UserError(
                f"model.path {self.path}: the tokenizer has {tokenizer.vocab_size} tokens but the model only "
                f"{self.spec.vocab}: they do not belong together"
            )
        return tokenizer


def in_float32(settings: ModelConfig) -> ModelConfig:
    """The same model in float32, which flash attention has not; all attentions compute the same function."""
    attention = "sdpa" if settings.attention == "flash_attention_2" else settings.attention
    return replace(settings, dtype="float32", attention=attention)


def read_base(settings: ModelConfig) -> Base:
    """What can be known of the base model before its weights are read.

    Raises:
        UserError: no such model, an unsupported family, or a type or an attention that it cannot compute in.
    """
    check_attention(settings)
    config, spec = read_config(settings.path)
    check_dtype(spec, settings.dtype)
    return Base(settings, config, spec)


def read_config(path: str) -> tuple[PreTrainedConfig, ArchSpec]:
    """transformers' configuration of a model and its `ArchSpec`; raises `UserError` as `read_base` does."""
    check_model(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError,
            StrictDataclassError) as error:  # fmt: skip
        told = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
        raise UserError(f"model.path {path}: no readable config.json there ({told})") from None
    if quantized := getattr(config, "quantization_config", None):
        raise UserError(
            f"model.path {path}: its weights are quantized ({quantized.get('quant_method')}): prune the model that "
            "they were made from, and quantize the export"
        )
    try:
        check_settings(config)
        return config, read_spec(config)
    except UserError as error:
        raise UserError(f"model.path {path}: {error}") from None


def check_settings(config: PreTrainedConfig) -> None:
    """Raise `UserError` for what transformers lets pass: an activation or a `rope_type` that it does not know (some
    families have one for each kind of layer), words in place of a number among its settings or as sliding window."""
    for name in ("hidden_act", "hidden_activation"):
        if (activation := getattr(config, name, None)) is not None and activation not in ACT2FN:
            raise UserError(
                f"config.json has {name} '{activation}', which the transformers that is installed does not know: "
                "mend config.json, or install a version that knows it"
            )
    rope = getattr(config, "rope_parameters", None) or {}
    known = ("default", *ROPE_INIT_FUNCTIONS)
    for one in (rope, *rope.values(), {"sliding_window": getattr(config, "sliding_window", None)}):
        if not isinstance(one, dict):
            continue
        if one.get("rope_type", "default") not in known:
            raise UserError(
                f"config.json has rope_type '{one['rope_type']}', and the transformers that is installed knows "
                f"{', '.join(known)}: mend config.json, or install a version that knows it"
            )
        for name, value in one.items():
            if isinstance(value, str) and name not in ("rope_type", "type"):
                raise UserError(f"config.json has {name} '{value}', where a number belongs: mend config.json")


def check_dtype(spec: ArchSpec, dtype: str, setting: str = "model.dtype") -> None:
    """Raise `UserError` for a type that a family cannot compute in, named by the setting that asks for it."""
    if (refusal := spec.refusal([dtype])) is not None:
        raise UserError(f"{setting}: {refusal}")


def check_trained_dtype(dtype: str) -> None:
    """Raise `UserError` for a type that nothing trains in."""
    if dtype == "float16":
        raise UserError("model.dtype: nothing trains in float16, whose range ends at 65,504: set model.dtype=bfloat16")


def check_attention(config: ModelConfig) -> None:
    """Raise `UserError` for an attention that does not compute in the model's type."""
    if config.attention == "flash_attention_2" and config.dtype == "float32":
        raise UserError("model.attention=flash_attention_2 computes in 16 bits: set model.dtype=bfloat16")


def load_model(base: Base, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The pretrained model, unmodified and whole, on a device.

    Raises:
        UserError: missing, damaged or incomplete weights.
    """
    directory = Path(base.path)
    if directory.is_dir() and not any(p for pattern in (WEIGHTS, PICKLED) for p in directory.glob(pattern)):
        raise UserError(f"model.path {base.path}: config.json but no weights (*.safetensors) there")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base.path, dtype=base.dtype, attn_implementation=base.settings.attention,
            trust_remote_code=False, output_loading_info=True,
            # Onto a card shard by shard: the ranks of a node would not find room for all their copies in its memory.
            device_map=None if torch.device(device).type == "cpu" else {"": device},
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, UnpicklingError, struct.error, RuntimeError, ValueError, ImportError,
            AssertionError, KeyError, TypeError, ArithmeticError) as error:  # fmt: skip
        raise UserError(f"model.path {base.path}: the weights cannot be loaded ({first_line(error)})") from None
    check_whole(base.path, info["missing_keys"])
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    if base.spec.tied and head is not embedding and not torch.equal(head, embedding):
        raise untied(base.path)
    return model.to(device)


def untied(path: str) -> UserError:
    """For a model whose configuration ties the head to the embedding, while its files hold another head."""
    return UserError(
        f"model.path {path}: its config.json ties the embeddings, but the weights hold another lm_head.weight: set "
        "tie_word_embeddings to false there"
    )


def stored_dtype(base: Base) -> torch.dtype:
    """The type of the base's weights: the one in its config.json, else that of their first floating tensor.

    Raises:
        UserError: damaged weights.
    """
    if base.config.dtype is not None:
        return base.config.dtype
    try:
        for file in sorted(fetch(base.path).glob(WEIGHTS)):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, it is no dict
                    kind = tensors.get_slice(name)[:0].dtype
                    if kind.is_floating_point:
                        return kind
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.path {base.path}: the weights cannot be loaded ({first_line(error)})") from None
    return torch.float32


def check_whole(path: str, missing: Collection[str]) -> None:
    """Raise `UserError` for a model that lacks these weights."""
    if missing:
        raise UserError(f"model {path}: {len(missing)} weights are missing, first {min(missing)}")
