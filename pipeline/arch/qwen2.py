"""Qwen2 and Qwen2.5: biases on q, k and v."""

from nuteprune.arch.base import ArchSpec, Family, read_llama_like


def read(config) -> ArchSpec:
    return read_llama_like(config, qkv_bias=True)


FAMILY = Family("qwen2", read)
