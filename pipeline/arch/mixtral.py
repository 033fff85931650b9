"""Mixtral: Mistral with a router and eight experts in place of each FFN."""

from nuteprune.arch.base import EXPERTS_REFUSE, ArchSpec, Family, read_llama_like


def read(config) -> ArchSpec:
    return read_llama_like(
        config, experts=config.num_local_experts, top_k=config.num_experts_per_tok, refuses=EXPERTS_REFUSE
    )


_FILES = ((".mlp.", ".block_sparse_moe."), ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
FAMILY = Family("mixtral", read, files=_FILES)
