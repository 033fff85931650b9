"""The models that `vllm_plugin` registers; imported by vLLM alone.

All four families are vLLM's LLaMA: Qwen2 with biases on q, k and v, Qwen3 with its own attention. Each layer is a stock
one that is built from a configuration of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.model_executor.models.utils import extract_layer_index


class NoSublayer(nn.Module):
    """In place of an absent attention or FFN: zeros, or the bias that its last projection left behind."""

    def __init__(self, projection: str, hidden: int, bias: bool):
        super().__init__()
        self.left = projection if bias else None
        if bias:  # under the name that it has in the checkpoint
            self.add_module(projection, nn.Module())
            getattr(self, projection).bias = nn.Parameter(torch.zeros(hidden), requires_grad=False)

    def forward(self, hidden_states: Tensor, positions: Tensor | None = None) -> Tensor:
        zeros = torch.zeros_like(hidden_states)
        return zeros + getattr(self, self.left).bias if self.left else zeros


class NoAttention(NoSublayer):
    """An absent attention, built as a stock layer builds its attention."""

    def __init__(self, *, hidden_size: int, bias_o_proj: bool, **_):
        super().__init__("o_proj", hidden_size, bias_o_proj)


class NormedAttention(Qwen3Attention):
    """Qwen3's attention, built as LLaMA's."""

    def __init__(self, *, config, max_position_embeddings: int, bias: bool, bias_o_proj: bool, **options):
        super().__init__(rope_parameters=config.rope_parameters, max_position=max_position_embeddings,
                         head_dim=config.head_dim, rms_norm_eps=config.rms_norm_eps, qkv_bias=bias,
                         **options)  # fmt: skip


class NoNorm(nn.Module):
    """In place of the norm before an absent sublayer: only adds to the residual stream, as vLLM's norms do."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None):
        return hidden_states if residual is None else (hidden_states, hidden_states + residual)


class RaggedLayer(LlamaDecoderLayer):
    """A stock decoder layer with sizes of its own."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: PreTrainedConfig | None = None):
        whole = config or vllm_config.model_config.hf_config
        groups, ffn = whole.layer_sizes(extract_layer_index(prefix))
        family = whole.model_type.removeprefix("nuteprune_")
        stock = NormedAttention if family == "qwen3" else LlamaAttention
        super().__init__(vllm_config, prefix, config=_one_layer(whole, groups, ffn, family),
                         attn_layer_type=stock if groups else NoAttention)  # fmt: skip
        if not groups:
            self.input_layernorm = NoNorm()
        if not ffn:
            self.mlp = NoSublayer("down_proj", whole.hidden_size, getattr(whole, "mlp_bias", False))
            self.post_attention_layernorm = NoNorm()


class RaggedForCausalLM(LlamaForCausalLM):
    """LLaMA of layers that differ."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=RaggedLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the model from a checkpoint; returns the names that were found."""
        return super().load_weights(self._even(weights))

    def _even(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """K and V of each group as often as makes all of a layer's KV heads serve as many query heads."""
        for name, weight in weights:
            if ".k_proj." in name or ".v_proj." in name:
                groups, _ = self.config.layer_sizes(extract_layer_index(name))
                rows, share = weight.unflatten(0, (len(groups), -1)), math.gcd(*groups)
                weight = torch.cat([rows[g] for g, count in enumerate(groups) for _ in range(count // share)])
            yield name, weight


def _one_layer(config: PreTrainedConfig, groups: list[int], ffn: int, family: str) -> PreTrainedConfig:
    """The configuration from which a stock layer is built; 1 where a sublayer is absent, for it is dropped."""
    layer = copy.copy(config)
    layer.per_layer_config = None
    layer.num_attention_heads = sum(groups) or 1
    layer.num_key_value_heads = sum(groups) // math.gcd(*groups) if groups else 1
    layer.intermediate_size = ffn or 1
    if family == "qwen2":
        layer.qkv_bias = True
    return layer
