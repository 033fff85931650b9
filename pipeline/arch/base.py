"""What the pipeline knows of a model family: sizes, parameter counts and the small model's configuration.

Shape letters used in the project: B batch, T tokens, D hidden, F ffn, H query heads, K key/value heads, L layers,
R LoRA rank, V vocabulary, P head dimension, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nuteprune.errors import UserError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + FFN
EXPERTS_REFUSE = (
    ("ffn_sublayers", "a layer keeps as many experts as its router chooses; gate experts or layers"),
    *((name, "experts are pruned without LoRA, which attention takes") for name in FFN),
)
"""`ArchSpec.refuses` of a mixture of experts."""
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linear layers that hold several projections, one below the other (Phi-3)."""


@dataclass(frozen=True)
class ArchSpec:
    """Sizes of one model, read from its configuration; everything that counts parameters goes through it.

    Args:
        family: transformers' `model_type`.
        layers, hidden, heads, kv_heads, head_dim, ffn, vocab: L, D, H, K, P, F, V.
        experts, top_k: E, each an FFN of F units of its own, and how many of them the router reads for a token; a layer
            without a router has one.
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
        fused: q, k and v are one linear layer, gate and up another (Phi-3).
        hidden_divides: the stock configuration wants D to be a multiple of H.
        refuses: kinds of gates, shapes, LoRA targets and types that the family cannot have, each with the reason.
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
    experts: int = 1
    top_k: int = 1
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
    fused: bool = False
    hidden_divides: bool = False
    refuses: tuple[tuple[str, str], ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads per key/value group."""
        return self.heads // self.kv_heads

    @property
    def ffn_units(self) -> int:
        """FFN units of a layer, those of its experts one after the other."""
        return self.experts * self.ffn

    @property
    def aligned(self) -> int:
        """Hidden sizes and FFN widths are multiples of this, however far a target is.

        transformers multiplies the stacked experts by `torch._grouped_mm`, which wants rows of whole 16 bytes.
        """
        return 1 if self.experts == 1 else 8

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The projections that can have LoRA."""
        return PROJECTIONS if self.experts == 1 else ATTENTION

    def refusal(self, names: Sequence[str]) -> str | None:
        """Why the family cannot have those of these units, shapes, … that it refuses first; None if it
        has them all."""
        refuses = self.refuses if self.experts > 1 else (*self.refuses, ("experts", "its layers have one FFN each"))
        reason = next((why for name, why in refuses if name in names), None)
        if reason is None:
            return None
        found = [name for name, why in refuses if name in names and why == reason]
        them = "it" if len(found) == 1 else "them"
        return f"{self.family} cannot have {', '.join(found)}, leave {them} out: {reason}"

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
        """Prunable parameters of the intact model: the decoder's projections, without norms, routers and embeddings."""
        return self._projections(self.experts)

    @property
    def prunable_read(self) -> int:
        """Those of them that are read for one token: of the experts only as many as the router chooses."""
        return self._projections(self.top_k)

    def _projections(self, experts: int) -> int:
        d, ffn = self.hidden, experts * self.ffn
        per_layer = self.heads * self.head_cost(d) + self.kv_heads * self.group_cost(d) + ffn * self.ffn_cost(d)
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
        ffn_size: the configuration's name of F.
        files: what stands in the weights' names in place of what transformers' modules say: (here, there).
    """

    model_type: str
    read: Callable[[object], ArchSpec]
    small_class: Callable[[object, int, int], str] | None = None
    ragged_class: str | None = None
    ffn_size: str = "intermediate_size"
    files: tuple[tuple[str, str], ...] = ()

    def file_name(self, name: str) -> str:
        """The name in the model's files of a parameter of the split model."""
        for here, there in self.files:
            name = name.replace(here, there)
        return name


def read_llama_like(config, **facts) -> ArchSpec:
    """The sizes every family here names alike; `facts` are the family's own."""
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    if min(heads, kv_heads, config.num_hidden_layers, config.hidden_size) < 1 or heads % kv_heads:
        raise UserError(
            f"config.json has {config.num_hidden_layers} layers of size {config.hidden_size}, {heads} heads and "
            f"{kv_heads} key-value heads: such a model cannot be"
        )
    facts = {"ffn": config.intermediate_size} | facts
    return ArchSpec(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        norm_eps=config.rms_norm_eps,
        **facts,
    )
