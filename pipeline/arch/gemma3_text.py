"""Gemma 3, text only (1B, 270M, and the language models cut out of the larger ones)."""

from nuteprune.arch.base import ArchSpec, Family, read_llama_like
from nuteprune.errors import UserError

_RANGE = "its hidden states grow beyond the largest float16 (of the 270M to 1.0e5); use bfloat16"


def read(config) -> ArchSpec:
    if config.final_logit_softcapping is not None or config.use_bidirectional_attention:
        raise UserError("Gemma 3 with final_logit_softcapping or use_bidirectional_attention is not supported")
    bias = bool(config.attention_bias)
    return read_llama_like(
        config, qkv_bias=bias, o_bias=bias, qk_norm="head", norm_offset=1.0, norm_in_float=True, embedding_root=True,
        hidden_divides=True, refuses=(("float16", _RANGE),),
        norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
               "post_feedforward_layernorm"),
        norms_behind=("post_attention_layernorm", "post_feedforward_layernorm"),
    )  # fmt: skip


FAMILY = Family("gemma3_text", read)
