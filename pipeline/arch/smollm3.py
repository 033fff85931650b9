"""SmolLM3: LLaMA in which every fourth layer has no rotary positions."""

from nuteprune.arch.base import ArchSpec, Family, read_llama_like


def read(config) -> ArchSpec:
    bias = bool(config.attention_bias)
    return read_llama_like(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.mlp_bias))


FAMILY = Family("smollm3", read)
