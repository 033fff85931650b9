"""Granite 3: LLaMA with multipliers on embeddings, residuals, attention scores and logits."""

from nuteprune.arch.base import ArchSpec, Family, read_llama_like


def read(config) -> ArchSpec:
    bias = bool(config.attention_bias)
    return read_llama_like(
        config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.mlp_bias),
        embedding_multiplier=float(config.embedding_multiplier), logits_scaling=float(config.logits_scaling),
    )  # fmt: skip


FAMILY = Family("granite", read)
