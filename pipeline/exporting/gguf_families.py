"""What llama.cpp has of each family, and what it wants of those beside LLaMA, Mistral and Qwen2.

Read in llama.cpp's `src/models/` and held against by `make check-llamacpp`. Phi-3 and Mixtral are its `llama`: the one
with its fused projections cut apart, the other with experts. OLMo 3 is `olmo2` with a sliding window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nuteprune.arch import ArchSpec

CHECKED = ("llama", "mistral", "qwen2")
"""Families that llama.cpp's `llama` and `deci` compute, in every shape."""
ARCHITECTURES = {
    "qwen3": "qwen3",
    "granite": "granite", "smollm3": "smollm3", "phi3": "llama", "olmo2": "olmo2", "olmo3": "olmo2",
    "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "mixtral": "llama",
}  # fmt: skip
"""Of the other families that were held against llama.cpp, in the uniform shape; a family in neither is refused."""
SILU = ("silu", "swish")
ACTIVATIONS = {"gemma3_text": ("gelu_pytorch_tanh", "gelu_new")}
"""transformers' names of the activation that llama.cpp computes, whatever a file says; of the others it is SiLU."""
NEIGHBOURS = ("llama", "deci", "granite", "smollm3")
"""Architectures that rotate neighbours where transformers rotates halves."""
BLOCK = 32
"""FFN widths are multiples of it: one block of q8_0."""
_NO_ROPE_STEP = 4
_GEMMA_27B = 62
"""Layers of the one Gemma 3 whose attention llama.cpp scales by hidden size / heads."""


def whole_blocks(width: int) -> int:
    """The FFN width in the file."""
    return -(-width // BLOCK) * BLOCK


def rope_of(config: PreTrainedConfig) -> dict:
    """How positions rotate; where local and global layers differ, in the global ones."""
    rope = config.rope_parameters or {}
    return rope.get("full_attention", rope)


def activation_of(config: PreTrainedConfig) -> str:
    """transformers' name of the FFN's activation."""
    return getattr(config, "hidden_activation", None) or config.hidden_act


def lacks(spec: ArchSpec, config: PreTrainedConfig) -> str:
    """What this model has and llama.cpp has not, in words; empty where there is nothing."""
    family, rope = spec.family, rope_of(config)
    if spec.o_bias and family != "granite":
        return "bias on o_proj"
    if spec.mlp_bias and family != "granite":
        return "biases in the FFN"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "heads that rotate only in part"
    if family == "smollm3":
        wanted = [int((index + 1) % _NO_ROPE_STEP != 0) for index in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != wanted:
            return f"layers without rotary positions but every {_NO_ROPE_STEP}th (leave `layers` out)"
    if family in ("olmo2", "olmo3") and config.num_attention_heads * config.head_dim != config.hidden_size:
        return "heads narrower than the hidden size (leave heads, kv_groups and hidden out)"
    if family == "gemma3_text" and config.num_hidden_layers == _GEMMA_27B:
        return f"scale of attention of its own in a model of {_GEMMA_27B} layers"
    if family == "qwen3_moe" and not config.norm_topk_prob:
        return "weights of experts that sum to less than 1 (norm_topk_prob)"
    return ""


def add_family(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """Settings that only these families have."""
    family = config.model_type
    if family == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if has_window(config):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if family in ("qwen3_moe", "mixtral"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if family == "qwen3_moe":
        writer.add_expert_feed_forward_length(whole_blocks(config.moe_intermediate_size))


def has_window(config: PreTrainedConfig) -> bool:
    """Whether this model has sliding windows that llama.cpp has too; it takes none of a file without such a layer."""
    known = config.model_type in ("olmo3", "gemma3_text") and config.sliding_window
    return bool(known) and "sliding_attention" in config.layer_types


def single(key: str, tensor: Tensor, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors that llama.cpp has in place of one of transformers': fused ones apart, Gemma's norms with their 1."""
    block, _, name = key.removesuffix(".weight").rpartition(".")
    if name == "qkv_proj":
        values = config.num_key_value_heads * config.head_dim
        parts = tensor.split([config.num_attention_heads * config.head_dim, values, values])
        yield from zip((f"{block}.{part}_proj.weight" for part in "qkv"), parts, strict=True)
    elif name == "gate_up_proj":
        rows = int(tensor.ndim == 3)  # of each expert, or of the layer
        parts = tensor.chunk(2, rows)
        yield from zip((f"{block}.{part}_proj.weight" for part in ("gate", "up")), parts, strict=True)
    elif block.endswith("experts"):
        yield f"{key}.weight", tensor
    elif config.model_type == "gemma3_text" and name.endswith("norm"):
        # It scales attention by the head size.
        scale = math.sqrt(config.head_dim / config.query_pre_attn_scalar) if name == "q_norm" else 1.0
        yield key, (tensor.to(torch.float32) + 1) * scale
    else:
        yield key, tensor
