"""OLMo 2: norms behind the sublayers instead of before them, RMSNorm over the whole width of queries and keys."""

from nuteprune.arch.base import SUBLAYERS_UNDER_NORMS, ArchSpec, Family, read_llama_like


def read(config) -> ArchSpec:
    bias = bool(config.attention_bias)
    return read_llama_like(
        config, qkv_bias=bias, o_bias=bias, qk_norm="width",
        norms=("post_attention_layernorm", "post_feedforward_layernorm"), refuses=SUBLAYERS_UNDER_NORMS,
    )  # fmt: skip


FAMILY = Family("olmo2", read)
