"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3 with a router and many small experts in place of each FFN."""

from nuteprune.arch.base import EXPERTS_REFUSE, ArchSpec, Family, read_llama_like
from nuteprune.errors import UserError


def read(config) -> ArchSpec:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise UserError("Qwen3-MoE with dense layers (mlp_only_layers, decoder_sparse_step) is not supported")
    bias = bool(config.attention_bias)
    return read_llama_like(
        config, qkv_bias=bias, o_bias=bias, qk_norm="head", ffn=config.moe_intermediate_size,
        experts=config.num_experts, top_k=config.num_experts_per_tok, refuses=EXPERTS_REFUSE,
    )  # fmt: skip


FAMILY = Family("qwen3_moe", read, ffn_size="moe_intermediate_size")
