"""Stock models whose decoder layers differ in attention heads, KV groups and FFN width.

Saved beside the weights of a model that NutePrune exported with shape `per_layer` or `per_layer_ffn`; loads with
`trust_remote_code=True`. All is transformers' own but the projections' shapes; K and V of unequal groups are repeated.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, cat, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.heterogeneity import HeterogeneousConfigMixin
from transformers.models.llama.modeling_llama import eager_attention_forward

PREFIX = "ragged_"

if TYPE_CHECKING:  # what the two mixins below stand in front of
    from transformers import PreTrainedConfig as Config
    from transformers import PreTrainedModel as Model
else:
    Config = Model = object


class Block(dict):
    """An entry of `block_configs`: vLLM reads it by attribute."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class RaggedConfig(Config):
    """What the configurations below add: layers with sizes of their own, as `per_layer_config` gives them.

    A layer may differ in `num_attention_heads`, `num_key_value_heads`, `intermediate_size` and, with experts, in their
    number and width; where its KV groups are unequal, `heads_per_group` lists their query heads; `skip` names what it
    lacks, "attention" or "mlp".
    `block_configs`, where they are there, say it once more for DeciLM of vLLM, which serves such a model unmodified.
    """

    heads_per_group: Any = None
    block_configs: list[Block] | None = None
    base_model_tp_plan = None  # unequal groups cannot be split evenly over devices
    # Stock code may read the whole model's sizes, which are the largest ones, and without a warning at each look.
    allow_global_per_layer_attribute_access = True

    def __getattribute__(self, name):
        # With `super` alone, for torch.compile follows no `object.__getattribute__`.
        if name == "num_experts" and "skip" in super().__getattribute__("__dict__"):
            return 0  # of one layer: vLLM's experts are alike in all layers, so it is to take transformers' own
        name = super().__getattribute__("attribute_map").get(name, name)
        return super(HeterogeneousConfigMixin, self).__getattribute__(name)  # past its warning of per-layer sizes

    def __setattr__(self, name, value):
        if name == "block_configs" and value:
            value = [Block({part: Block(facts) for part, facts in block.items()}) for block in value]
        super().__setattr__(name, value)

    def to_dict(self):
        """As in transformers; with `block_configs` the architecture is vLLM's."""
        values = super().to_dict()
        return values | {"architectures": ["DeciLMForCausalLM"]} if self.block_configs else values

    @property
    def num_kv_heads(self) -> int:
        """Of a layer's configuration: the KV heads that attention is called with, which vLLM allocates a cache for."""
        groups = self.heads_per_group
        return sum(groups) // math.gcd(*groups) if groups else self.num_key_value_heads

    @property
    def logit_scale(self) -> float:
        """Granite's, where vLLM looks for it."""
        return 1.0 / getattr(self, "logits_scaling", 1.0)

    def layer_sizes(self, index: int) -> tuple[list[int], int]:
        """Query heads of each KV group ([]: no attention) and FFN width (0: none) of a layer."""
        layer = self.per_layer_config[index]
        skip, heads, count = getattr(layer, "skip", ()), layer.num_attention_heads, layer.num_key_value_heads
        groups = [] if "attention" in skip else layer.heads_per_group or [heads // count] * count
        width = getattr(layer, "moe_intermediate_size", layer.intermediate_size)
        return groups, 0 if "mlp" in skip else width

    def validate_architecture(self):
        """Nothing: LLaMA's hidden % heads == 0 does not apply with an explicit head_dim."""


class Bias(nn.Module):
    """What is left of a projection with no inputs: its bias, for any input."""

    def __init__(self, bias: nn.Parameter):
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return _zeros(len(self.bias), x) + self.bias


def _zeros(width: int, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], width)


def _remove(owner: nn.Module, name: str, width: int, bias: nn.Parameter | None = None) -> None:
    """Of a projection with no inputs or no outputs left keep its bias, or a function that gives zeros [..., width].

    That is no module, so those who look for projections by their names, as PEFT does, find the ones that are there.
    """
    delattr(owner, name)
    setattr(owner, name, partial(_zeros, width) if bias is None else Bias(bias))


class Ragged(Model):
    """Mixed in before a stock model: gives each layer its own widths once the stock model is built."""

    def __init__(self, config):
        per_layer = config.to_dict().get("per_layer_config")
        config.per_layer_config = None  # at first all layers are as wide as the widest one
        super().__init__(config)
        config.per_layer_config = per_layer
        decoder: Any = getattr(self, "model", self)
        for index, layer in enumerate(decoder.layers):
            groups, ffn = config.layer_sizes(index)
            _resize_attention(layer.self_attn, groups)
            _resize_ffn(layer.mlp, ffn, getattr(config.per_layer_config[index], "num_local_experts", 0))
            if hasattr(layer, "post_feedforward_layernorm"):  # norms behind the sublayers stay
                continue
            for name, there in (("input_layernorm", groups), ("post_attention_layernorm", ffn)):
                if not there:
                    setattr(layer, name, nn.Identity())
        self.set_attn_implementation(self.config._attn_implementation)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As of the stock class: transformers looks for a decorator in the source of a class's own module."""
        stock: Any = cls.__bases__[1]
        return stock._can_set_experts_implementation()

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """As in transformers; the implementation is wrapped so that it takes unequal groups."""
        if isinstance(attn_implementation, dict):
            wrapped: str | dict = {part: _ragged(name) for part, name in attn_implementation.items()}
        else:
            wrapped = _ragged(attn_implementation)
        super().set_attn_implementation(wrapped, **kwargs)


def _resize_attention(attention: nn.Module, groups: list[int]) -> None:
    width, size = sum(groups) * attention.head_dim, len(groups) * attention.head_dim
    attention.heads_per_group = groups
    attention.num_key_value_groups = math.gcd(*groups)
    for name, rows in (("q_norm", width), ("k_norm", size)):
        norm = getattr(attention, name, None)
        if norm is not None and not groups:
            setattr(attention, name, nn.Identity())
        elif norm is not None and len(norm.weight) != attention.head_dim:  # OLMo's, over all heads
            norm.weight = nn.Parameter(norm.weight.detach()[:rows].clone())
    if groups:
        for linear, rows in ((attention.q_proj, width), (attention.k_proj, size), (attention.v_proj, size)):
            _cut(linear, rows, linear.in_features)
        _cut(attention.o_proj, attention.o_proj.out_features, width)
        return
    _remove(attention, "q_proj", 0)
    # One head of zeros: a cache measures its length by keys, and an empty tensor has none.
    _remove(attention, "k_proj", attention.head_dim)
    _remove(attention, "v_proj", attention.head_dim)
    _remove(attention, "o_proj", attention.o_proj.out_features, attention.o_proj.bias)


def _resize_ffn(mlp: nn.Module, size: int, experts: int) -> None:
    if experts:
        _resize_experts(mlp, experts, size)
    elif size:
        for linear in (mlp.gate_proj, mlp.up_proj):
            _cut(linear, size, linear.in_features)
        _cut(mlp.down_proj, mlp.down_proj.out_features, size)
    else:
        _remove(mlp, "gate_proj", 0)
        _remove(mlp, "up_proj", 0)
        _remove(mlp, "down_proj", mlp.down_proj.out_features, mlp.down_proj.bias)


def _resize_experts(mlp: nn.Module, count: int, size: int) -> None:
    """Keep the first experts, of this width each, and their rows of the router."""
    experts, router = mlp.experts, mlp.gate
    experts.num_experts = router.num_experts = count
    experts.intermediate_dim = size
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[:count, : 2 * size].clone())
    experts.down_proj = nn.Parameter(experts.down_proj.detach()[:count, :, :size].clone())
    router.weight = nn.Parameter(router.weight.detach()[:count].clone())


def _cut(linear: nn.Linear, rows: int, columns: int) -> None:
    """Keep the first rows and columns: the initial values, device (meta too) and type stay what they were."""
    linear.weight = nn.Parameter(linear.weight.detach()[:rows, :columns].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:rows].clone())
    linear.out_features, linear.in_features = rows, columns


def _ragged(base: str | None) -> str:
    """Register attention `base` (and its mask) with unequal groups allowed; returns the implementation's name.

    Flash attention keeps its name, for under another with "flash" in it transformers looks for a kernel on the hub, and
    vLLM's, for vLLM looks for it.
    """
    base = (base or "eager").removeprefix(PREFIX)
    name = base if "flash" in base or base == "vllm" else PREFIX + base
    inner = eager_attention_forward if base == "eager" else AttentionInterface()[base]

    def attention(module, query, key, value, attention_mask, **kwargs):
        if query.shape[1] == 0:
            return query.transpose(1, 2), None
        groups = getattr(module, "heads_per_group", ())
        if len(set(groups)) > 1:
            key, value = _evened(key, groups), _evened(value, groups)
        return inner(module, query, key, value, attention_mask, **kwargs)

    wrapper: Any = attention
    wrapper.inner, wrapper.takes_groups = inner, True
    wrapped = inner
    while wrapped is not None and not hasattr(wrapped, "takes_groups"):
        wrapped = getattr(wrapped, "inner", None)
    if wrapped is None:
        AttentionInterface.register(name, wrapper)
    if base in AttentionMaskInterface():
        AttentionMaskInterface.register(name, AttentionMaskInterface()[base])
    return name


def _evened(states: Tensor, groups: Sequence[int]) -> Tensor:
    """[B, K, T, P]: each group as often as makes all KV heads serve as many query heads."""
    share = math.gcd(*groups)
    heads = zip(states.split(1, dim=1), groups, strict=True)
    return cat([head.expand(-1, count // share, -1, -1) for head, count in heads], dim=1)


def _define(name: str, causal: str) -> None:
    """`Ragged…Config`, `Ragged…Model` and `Ragged…ForCausalLM` over the stock classes of a family."""
    stock, module = getattr(transformers, f"{name}Config"), {"__module__": __name__}
    config = strict(
        type(f"Ragged{name}Config", (RaggedConfig, stock), module | {"model_type": f"nuteprune_{name.lower()}"})
    )
    globals()[config.__name__] = config
    for ours, theirs in ((f"Ragged{name}Model", f"{name}Model"), (f"Ragged{name}ForCausalLM", f"{causal}ForCausalLM")):
        globals()[ours] = type(ours, (Ragged, getattr(transformers, theirs)), module | {"config_class": config})


FAMILIES = "Llama Mistral Mixtral Qwen2 Qwen3 Qwen3Moe Granite SmolLM3 Olmo2 Olmo3 Gemma3Text"
for _name in FAMILIES.split():
    if hasattr(transformers, f"{_name}Config"):  # an older transformers lacks the newest
        _define(_name, _name.removesuffix("Text"))
