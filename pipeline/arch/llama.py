"""LLaMA 1-3 and its relatives that ship as `LlamaForCausalLM` (SmolLM2, TinyLlama, …)."""

from nuteprune.arch.base import ArchSpec, Family, read_llama_like
from nuteprune.errors import UserError


def read(config) -> ArchSpec:
    bias, mlp_bias = bool(config.attention_bias), bool(config.mlp_bias)
    return read_llama_like(
        config, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias, hidden_divides=bias or mlp_bias
    )  # fmt: skip


def small_class(config, hidden: int, heads: int) -> str:
    """LlamaConfig refuses hidden % heads != 0; without biases and sliding window Mistral is the same network."""
    if hidden % heads == 0:
        return "LlamaConfig"
    if config.attention_bias or config.mlp_bias:
        raise UserError(
            f"a LLaMA model with biases cannot have hidden size {hidden} with {heads} heads: "
            "use export.shape=per_layer, or leave `hidden` out of gates.units"
        )
    return "MistralConfig"


FAMILY = Family("llama", read, small_class)
