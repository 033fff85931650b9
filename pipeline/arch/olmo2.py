"""OLMo 2: norms behind the sublayers instead of before them, RMSNorm over the whole width of queries and keys."""

from nuteprune.arch.base import ArchSpec, Family, read_llama_like


def read(config) -> ArchSpec:
    bias, norms = bool(config.attention_bias), ("post_attention_layernorm", "post_feedforward_layernorm")
    return read_llama_like(config, qkv_bias=bias, o_bias=bias, qk_norm="width", norms=norms, norms_behind=norms,
                           norm_in_float=True)  # fmt: skip


FAMILY = Family("olmo2", read)
