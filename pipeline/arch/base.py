"""What the pipeline knows of a model family: sizes, parameter counts and the small model's configuration.

Shape letters used in the project: B batch, T tokens, D hidden, F ffn, H query heads, K key/value heads, L layers,
R LoRA rank, V vocabulary, P head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + FFN


@dataclass(frozen=True)
class ArchSpec:
    """Sizes of one model, read from its configuration; everything that counts parameters goes through it.

    Args:
        family: transformers' `model_type`.
        layers, hidden, heads, kv_heads, head_dim, ffn, vocab: L, D, H, K, P, F, V.
        tied: the output head shares the embedding's weight.
        qkv_bias, o_bias, mlp_bias: which projections carry a bias.
        qk_norm: queries and keys are RMS-normalised per head (Qwen3).
        norm_eps: epsilon of every RMSNorm.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6

    @property
    def group_size(self) -> int:
        """Query heads per key/value group."""
        return self.heads // self.kv_heads

    def head_cost(self, hidden):
        """Parameters of one query head (its rows of q, its columns of o) with `hidden` kept hidden dimensions."""
        return self.head_dim * (2 * hidden + self.qkv_bias)

    def group_cost(self, hidden):
        """Parameters of one key/value group (its rows of k and v)."""
        return 2 * self.head_dim * (hidden + self.qkv_bias)

    def ffn_cost(self, hidden):
        """Parameters of one FFN unit (a row of gate and up, a column of down)."""
        return 3 * hidden + 2 * self.mlp_bias

    @property
    def prunable(self) -> int:
        """Prunable parameters of the intact model: the decoder's projections, without norms and embeddings."""
        d = self.hidden
        per_layer = self.heads * self.head_cost(d) + self.kv_heads * self.group_cost(d) + self.ffn * self.ffn_cost(d)
        return self.layers * per_layer


@dataclass(frozen=True)
class Family:
    """A supported family.

    Args:
        model_type: transformers' name of it.
        read: configuration -> `ArchSpec`.
        small_class: name of the transformers configuration class that can hold the exported model, given the
            configuration and the small sizes (hidden, heads).
    """

    model_type: str
    read: Callable[[object], ArchSpec]
    small_class: Callable[[object, int, int], str]


def read_llama_like(config, **biases) -> ArchSpec:
    """The sizes every family here names alike; `biases` are the family's own facts."""
    heads = config.num_attention_heads
    return ArchSpec(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        norm_eps=config.rms_norm_eps,
        **biases,
    )


def projections(layer: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """For each of the seven projections of a decoder layer: the module that owns it and its attribute name there."""
    owners = {name: (layer.self_attn, name) for name in ATTENTION}
    owners.update({name: (layer.mlp, name) for name in FFN})
    return owners
