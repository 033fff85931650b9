"""Qwen3: RMSNorm on each query and key head."""

from nuteprune.arch.base import ArchSpec, Family, read_llama_like


def read(config) -> ArchSpec:
    bias = bool(config.attention_bias)
    return read_llama_like(config, qkv_bias=bias, o_bias=bias, qk_norm="head")


FAMILY = Family("qwen3", read)
