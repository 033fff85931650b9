"""Sizes of public models by name and hub id, so that a run is planned without their config.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nuteprune.errors import UserError
from nuteprune.model.hub import check_model

if TYPE_CHECKING:  # torch and transformers take seconds, and a name is checked before them
    from nuteprune.arch import ArchSpec

_LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "dtype": "bfloat16"}
MODELS = {
    "llama-7b": _LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                          "intermediate_size": 11008, "vocab_size": 32000},
    "llama-13b": _LLAMA | {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
                           "intermediate_size": 13824, "vocab_size": 32000},
    "llama-3.2-1b": _LLAMA | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
                              "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
                              "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-3.1-8b": _LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                              "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
    "llama-3.1-70b": _LLAMA | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
                               "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256},
    "qwen3-32b": _LLAMA | {"model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 64,
                           "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
                           "intermediate_size": 25600, "vocab_size": 151936},
    "mistral-7b": _LLAMA | {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32,
                            "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
                            "vocab_size": 32768, "sliding_window": None},
    "qwen3-14b": _LLAMA | {"model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 40,
                           "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
                           "intermediate_size": 17408, "vocab_size": 151936},
    "granite-3.3-8b": _LLAMA | {"model_type": "granite", "hidden_size": 4096, "num_hidden_layers": 40,
                                "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12800,
                                "vocab_size": 49159, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
                                "residual_multiplier": 0.22, "attention_multiplier": 0.0078125,
                                "logits_scaling": 16.0},
    "smollm3-3b": _LLAMA | {"model_type": "smollm3", "hidden_size": 2048, "num_hidden_layers": 36,
                            "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 11008,
                            "vocab_size": 128256, "tie_word_embeddings": True},
    "phi-4": _LLAMA | {"model_type": "phi3", "hidden_size": 5120, "num_hidden_layers": 40,
                       "num_attention_heads": 40, "num_key_value_heads": 10, "intermediate_size": 17920,
                       "vocab_size": 100352, "pad_token_id": None},
    "olmo-2-7b": _LLAMA | {"model_type": "olmo2", "hidden_size": 4096, "num_hidden_layers": 32,
                           "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 100352},
    "gemma-3-1b": _LLAMA | {"model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26,
                            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
                            "intermediate_size": 6912, "vocab_size": 262144, "tie_word_embeddings": True,
                            "sliding_window": 512},
    "olmo-3-7b": _LLAMA | {"model_type": "olmo3", "hidden_size": 4096, "num_hidden_layers": 32,
                           "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 100278},
    "qwen3-30b-a3b": _LLAMA | {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
                               "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
                               "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
                               "norm_topk_prob": True, "vocab_size": 151936},
    "mixtral-8x7b": _LLAMA | {"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32,
                              "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
                              "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000},
}  # fmt: skip
"""Sizes of public models, by the name `nuteprune plan` takes: enough of their config.json to plan, in bfloat16."""
HUB = {
    "huggyllama/llama-7b": "llama-7b",
    "huggyllama/llama-13b": "llama-13b",
    "meta-llama/Llama-2-7b-hf": "llama-7b",
    "meta-llama/Llama-2-13b-hf": "llama-13b",
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "mistralai/Mistral-7B-v0.3": "mistral-7b",
    "Qwen/Qwen3-14B": "qwen3-14b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "ibm-granite/granite-3.3-8b-instruct": "granite-3.3-8b",
    "HuggingFaceTB/SmolLM3-3B-Base": "smollm3-3b",
    "HuggingFaceTB/SmolLM3-3B": "smollm3-3b",
    "microsoft/phi-4": "phi-4",
    "allenai/OLMo-2-1124-7B": "olmo-2-7b",
    "google/gemma-3-1b-pt": "gemma-3-1b",
    "google/gemma-3-1b-it": "gemma-3-1b",
    "allenai/Olmo-3-1025-7B": "olmo-3-7b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen/Qwen3-30B-A3B-Base": "qwen3-30b-a3b",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral-8x7b",
}
"""Hub ids of those sizes, which are known without asking the hub (some of them it tells to licensees only)."""


def named_spec(name: str) -> ArchSpec:
    """The architecture of a model in `MODELS`."""
    from nuteprune.arch import read_spec

    return read_spec(named_config(name))


def named_config(name: str) -> object:
    """transformers' configuration of a model in `MODELS`."""
    from transformers import AutoConfig

    sizes = dict(MODELS[name])
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes)


def read_model(model: str) -> tuple[object, ArchSpec]:
    """Configuration and architecture of a directory, a config.json, a hub id or a name of `MODELS`.

    Only a hub id (`name` or `owner/name` that is no path here) that is not in `HUB` is looked up on the network.
    """
    name = check_named(model)
    if name in MODELS:
        return named_config(name), named_spec(name)
    from nuteprune.model.loading import read_config

    return read_config(model)


def check_named(model: str) -> str:
    """The name in `MODELS` of a model that is given as for `read_model`, or what was given; raises `UserError` where
    there is none."""
    if not model:
        known = ", ".join(MODELS)
        raise UserError(f"name a model: a directory, a config.json, a hub id or one of {known}")
    path = Path(model)
    name = model.lower() if path.exists() else HUB.get(model, model.lower())
    if name in MODELS:
        return name
    if not path.exists() and (path.suffix == ".json" or model.startswith((".", "/", "~")) or len(path.parts) > 2):
        raise UserError(f"model.path: {model}: there is no such file or directory")
    try:
        check_model(model)
    except UserError as error:
        if path.exists():
            raise
        raise UserError(f"{error}; known without the hub: {', '.join(MODELS)}") from None
    return model
