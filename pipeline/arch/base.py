"""What the pipeline knows of a model family: sizes, parameter counts and the small model's configuration.

Shape letters used in the project: B batch, T tokens, D hidden, F ffn, H query heads, K key/value heads, L layers,
R LoRA rank, V vocabulary, P head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + FFN
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linear layers that hold several projections, one below the other (Phi-3)."""


@dataclass(frozen=True)
class ArchSpec:
    """Sizes of one model, read from its configuration; everything that counts parameters goes through it.

    Args:
        family: transformers' `model_type`.
        layers, hidden, heads, kv_heads, head_dim, ffn, vocab: L, D, H, K, P, F, V.
        tied: the output head shares the embedding's weight.
        qkv_bias, o_bias, mlp_bias: which projections carry a bias.
        qk_norm: queries and keys are RMS-normalised per "head" (Qwen3) or over their whole "width" (OLMo 2); "": not.
        norm_eps: epsilon of every RMSNorm.
        norms: names of a layer's RMSNorms over the hidden dimensions, before its sublayers or behind them.
        norms_behind: those of them behind the attention and behind the FFN, if any: what follows is scale-free, so the
            gate of a whole sublayer or layer acts behind them, not before.
        norm_offset: what an RMSNorm adds to its weight before it multiplies (Gemma: 1).
        norm_in_float: an RMSNorm multiplies by its weight before it rounds to the model's type (OLMo 2, Gemma).
        embedding_multiplier: what the decoder multiplies the embeddings with that it is given (Granite).
        embedding_root: the embedding multiplies its rows by sqrt(D) (Gemma), which changes with D.
        logits_scaling: what the output head's logits are divided by (Granite).
        hidden_divides: the stock configuration wants D to be a multiple of H.
        refuses: kinds of gates and shapes that the family cannot have, each with the reason.
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
    qk_norm: str = ""
    norm_eps: float = 1e-6
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norms_behind: tuple[str, ...] = ()
    norm_offset: float = 0.0
    norm_in_float: bool = False
    embedding_multiplier: float = 1.0
    embedding_root: bool = False
    logits_scaling: float = 1.0
    hidden_divides: bool = False
    refuses: tuple[tuple[str, str], ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads per key/value group."""
        return self.heads // self.kv_heads

    def refusal(self, names: Sequence[str]) -> str | None:
        """Why the family cannot have the first of these units and shapes that it refuses; None if it has them all."""
        found = ((name, reason) for name, reason in self.refuses if name in names)
        return next((f"{self.family} cannot have {name}, leave it out: {reason}" for name, reason in found), None)

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
            configuration and the small sizes (hidden, heads); None: the configuration's own.
        ragged_class: the same for the `per_layer` shape; None: the configuration's own.
    """

    model_type: str
    read: Callable[[object], ArchSpec]
    small_class: Callable[[object, int, int], str] | None = None
    ragged_class: str | None = None


def read_llama_like(config, **facts) -> ArchSpec:
    """The sizes every family here names alike; `facts` are the family's own."""
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
        **facts,
    )
