"""Folding: gates and LoRA multiplied into the weights, removed rows and columns deleted, in float32.

Exactness of the norms. With d' of d hidden dimensions kept the removed ones are zero, so RMSNorm's mean square over d'
is d/d' times that over d. With c = sqrt(d/d'), eps' = c²·eps and w' = c·w:
    w'·x / sqrt(c²·ms(x) + c²·eps) = w·x / sqrt(ms(x) + eps).
Qwen3's q_norm and k_norm run over the head dimension, which does not change, but read the same eps' from the
configuration. Scaling their input (the rows and biases of q_proj and k_proj) by c makes that exact too:
    w·(c·q) / sqrt(c²·ms(q) + c²·eps) = w·q / sqrt(ms(q) + eps).
OLMo 2's run over all heads, where a removed head counts as zeros. With n' of n heads kept and r² = n/n' the mean square
over those is r²·ms(q): scaling the rows by c/r and the norm's weight by r is exact.
Where a norm follows a sublayer, the gate of all that the sublayer adds is a factor of that norm's weight.
Gemma's norms multiply by 1 + w, so w' = c·(1 + w) - 1. Its embeddings are multiplied by sqrt(d'), not sqrt(d): they are
scaled by c, and where the head shares them the last norm keeps its weight, which undoes that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nuteprune.arch import ATTENTION, FUSED, PROJECTIONS, ArchSpec, family_of, fuse, projections
from nuteprune.errors import UserError
from nuteprune.exporting import modeling_ragged
from nuteprune.masks import Gates, Kept
from nuteprune.model.layers import LoraWeights

log = logging.getLogger(__name__)

PER_LAYER_LISTS = ("layer_types", "no_rope_layers")
"""Entries of a configuration with one value for each layer."""
_RENAMED = {"architectures", "model_type", "transformers_version", "auto_map"}
"""Entries of a base configuration that say what the base was, not how it computes."""


def _register() -> set[str]:
    """Make transformers' auto classes use this package's classes for exports of ours, never a directory's own file.

    Returns:
        The model types of those.
    """
    types = set()
    for cls in vars(modeling_ragged).values():
        own = isinstance(cls, type) and cls.__module__ == modeling_ragged.__name__
        if own and issubclass(cls, PreTrainedConfig):
            AutoConfig.register(cls.model_type, cls, exist_ok=True)
            types.add(cls.model_type)
        elif own and issubclass(cls, PreTrainedModel):
            auto = AutoModelForCausalLM if cls.__name__.endswith("ForCausalLM") else AutoModel
            auto.register(cls.config_class, cls, exist_ok=True)
    return types


OWN_TYPES = _register()


@dataclass(frozen=True)
class Fold:
    """What is folded into a base model.

    Attributes:
        spec: the base's architecture.
        head_gate, ffn_gate, hidden_gate: effective gates [L, H], [L, F], [D], float32.
        added_gates: [2, L], on what attention and FFN add to the stream.
        kept: the units that stay.
        lora, scaling: LoRA pairs by "layer.projection", and alpha / rank.
    """

    spec: ArchSpec
    head_gate: Tensor
    ffn_gate: Tensor
    hidden_gate: Tensor
    added_gates: Tensor
    kept: Kept
    lora: LoraWeights
    scaling: float

    @property
    def norm_scale(self) -> float:
        """c = sqrt(d / d'), see the module's docstring."""
        return math.sqrt(self.spec.hidden / len(self.kept.hidden))

    @property
    def unties(self) -> bool:
        """Tied embeddings cannot hold a fractional hidden gate: it scales the embedding but not the head."""
        return self.spec.tied and bool((self.hidden_gate[self.kept.hidden] != 1).any())

    @property
    def vllm_misreads(self) -> bool:
        """vLLM's Qwen2 has no head size of its own but takes hidden size / heads; of the uniform shape."""
        width = max(map(len, self.kept.heads)) * self.spec.head_dim
        return self.spec.family == "qwen2" and width != len(self.kept.hidden)


def plan_fold(spec: ArchSpec, gates: Gates, lora: LoraWeights, scaling: float) -> Fold:
    """The fold of given gates and LoRA; raises UserError where no hidden dimension or no layer is left."""
    full = gates.detach().to("cpu", torch.float32).full(spec)
    kept = Kept.of(spec, full)
    if len(kept.hidden) == 0:
        raise UserError("no hidden dimension is left: lower the target sparsity")
    if len(kept.layers) == 0:
        raise UserError("no decoder layer is left: lower the target sparsity")
    added = torch.stack(full.added_gates(spec))
    return Fold(spec, full.head_gate(spec), full.ffn_gate(spec), full.hidden, added, kept, lora, scaling)


def small_config(base: PreTrainedConfig, fold: Fold, shape: str) -> PreTrainedConfig:
    """The configuration of the small model; everything but the sizes is carried over from the base.

    Args:
        base: the base model's configuration.
        fold: what is folded.
        shape: "uniform" (a stock class), "per_layer" or "per_layer_ffn" (a class of `modeling_ragged`).

    Raises:
        UserError: no stock class can hold these sizes.
    """
    if (refusal := fold.spec.refusal([shape])) is not None:
        raise UserError(f"export.shape: {refusal}")
    kept = fold.kept.layers.tolist()
    every_group = fold.kept.heads_per_group
    every_width, family = fold.kept.ffn_widths, family_of(base)
    groups, ffn = [every_group[i] for i in kept], [max(every_width[i], default=0) for i in kept]
    values = {k: v for k, v in base.to_dict().items() if k not in _RENAMED}
    values |= {
        "num_hidden_layers": len(kept),
        "hidden_size": len(fold.kept.hidden),
        "num_attention_heads": max(1, *map(sum, groups)),
        "num_key_value_heads": max(1, *map(len, groups)),
        "head_dim": fold.spec.head_dim,
        family.ffn_size: max(1, *ffn),
        "rms_norm_eps": fold.spec.norm_eps * fold.norm_scale**2,
        "tie_word_embeddings": fold.spec.tied and not fold.unties,
    }
    if fold.spec.experts > 1:
        values["num_local_experts"] = max(len(fold.kept.experts[i]) for i in kept)
    for name in PER_LAYER_LISTS:
        if values.get(name):
            values[name] = [values[name][i] for i in kept]
    if shape != "uniform":
        name = family.ragged_class or type(base).__name__
        values = _of_class(values, base, getattr(transformers, name))
        stem = name.removesuffix("Config")
        layers = [_overrides(*sizes, family.ffn_size) for sizes in zip(groups, ffn, strict=True)]
        if fold.spec.experts > 1:
            for layer, index in zip(layers, kept, strict=True):
                layer["num_local_experts"] = len(fold.kept.experts[index])
        values["per_layer_config"] = dict(enumerate(layers))
        values["auto_map"] = {
            "AutoConfig": f"modeling_ragged.Ragged{stem}Config",
            "AutoModel": f"modeling_ragged.Ragged{stem}Model",
            "AutoModelForCausalLM": f"modeling_ragged.Ragged{stem}ForCausalLM",
        }
        return getattr(modeling_ragged, f"Ragged{stem}Config")(**values)
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if fold.spec.hidden_divides and hidden % heads:
        raise UserError(
            f"a stock {fold.spec.family} model like this one cannot have hidden size {hidden} with {heads} heads: "
            "use export.shape=per_layer, or leave `hidden` out of gates.units"
        )
    if fold.vllm_misreads:
        log.warning("vLLM's Qwen2 has no head size of its own but takes hidden size / heads, %d / %d here and not %d: "
                    "serve it with --model-impl transformers", hidden, heads, fold.spec.head_dim)  # fmt: skip
    cls = getattr(transformers, family.small_class(base, hidden, heads)) if family.small_class else type(base)
    return cls(**_of_class(values, base, cls))


def _of_class(values: dict, base: PreTrainedConfig, cls: type[PreTrainedConfig]) -> dict:
    """The values that the class knows, if it is not the base's own: Mistral for a LLaMA, or for a Phi-3."""
    if isinstance(base, cls):
        return values
    known = {k: v for k, v in values.items() if k in cls.__dataclass_fields__}
    return {"sliding_window": None} | known  # the one thing Mistral adds to LLaMA


def _overrides(groups: list[int], ffn: int, ffn_size: str) -> dict:
    """A layer's entry in transformers' `per_layer_config`, which drops what is as in the whole model."""
    sizes: dict = {"skip": [name for name, there in (("attention", groups), ("mlp", ffn)) if not there]}
    # vLLM keeps a cache for an absent attention too: one head is the smallest.
    sizes["num_key_value_heads"] = max(1, len(groups))
    if groups:
        sizes["num_attention_heads"] = sum(groups)
    if len(set(groups)) > 1:
        sizes["heads_per_group"] = groups
    return sizes | ({ffn_size: ffn} if ffn else {})


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal language model class of a small configuration."""
    if isinstance(config, modeling_ragged.RaggedConfig):
        return getattr(modeling_ragged, type(config).__name__.removesuffix("Config") + "ForCausalLM")
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def fold_model(model: PreTrainedModel, config: PreTrainedConfig, fold: Fold, progress=iter) -> PreTrainedModel:
    """The small model in float32; consumes the base layer by layer, so that no second copy is ever held.

    Args:
        model: the base model; its decoder layers are dropped as they are folded.
        config: from `small_config`.
        fold: what is folded.
        progress: wraps the iterable of layer indices, e.g. `tqdm`.
    """
    with torch.device("meta"):
        small = model_class(config)(config)
    layers = model.model.layers
    place = {index: number for number, index in enumerate(fold.kept.layers.tolist())}
    for index in progress(range(fold.spec.layers)):
        if index in place:
            into = small.model.layers[place[index]]
            into.load_state_dict(fuse(fold_layer(fold, layers[index], index), into), assign=True)
        layers[index] = nn.Identity()
    embedding, norm, head = fold_ends(fold, model)
    small.model.embed_tokens.load_state_dict({"weight": embedding}, assign=True)
    small.model.norm.load_state_dict({"weight": norm}, assign=True)
    small.lm_head.load_state_dict({"weight": embedding if head is None else head}, assign=True)
    small.tie_weights()
    return small


def fold_layer(fold: Fold, layer: nn.Module, index: int) -> dict[str, Tensor]:
    """State dict of one small decoder layer, float32; tensors with nothing left in them are not in it."""
    state = {}
    for name, (owner, attribute) in projections(layer).items():
        block = "self_attn" if name in ATTENTION else "mlp"
        for part, tensor in _projection(fold, getattr(owner, attribute), name, index):
            state[f"{block}.{name}.{part}"] = tensor
    if fold.spec.experts > 1:
        state["mlp.gate.weight"] = layer.mlp.gate.weight.detach()[fold.kept.experts[index]][:, fold.kept.hidden].float()
    behind = fold.spec.norms_behind
    # In front of what a layer lacks nothing is normed, and vLLM's DeciLM has no such norm.
    ahead = {} if behind else {"input_layernorm": fold.kept.heads, "post_attention_layernorm": fold.kept.ffn}
    for norm in fold.spec.norms:
        if norm in ahead and not len(ahead[norm][index]):
            continue
        gate = float(fold.added_gates[behind.index(norm), index]) if norm in behind else 1.0
        state[f"{norm}.weight"] = _norm(fold, getattr(layer, norm), fold.norm_scale * gate)
    if fold.spec.qk_norm and len(fold.kept.heads[index]):
        for norm, name in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
            weight = getattr(layer.self_attn, norm).weight.detach().float()
            if fold.spec.qk_norm == "width":
                weight = weight[_sides(fold, name, index)[0]] * _width_scale(fold, name, index)
            state[f"self_attn.{norm}.weight"] = weight
    return {key: tensor for key, tensor in state.items() if tensor.numel()}


def fold_ends(fold: Fold, model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embedding [V, d'], final norm [d'] and head [V, d'] (None: tied), float32."""
    kept = fold.kept.hidden
    embedding = model.get_input_embeddings().weight.detach()[:, kept].float() * fold.hidden_gate[kept]
    tied = fold.spec.tied and not fold.unties
    head = None if tied else model.lm_head.weight.detach()[:, kept].float()
    root = fold.norm_scale if fold.spec.embedding_root else 1.0
    return embedding * root, _norm(fold, model.model.norm, fold.norm_scale / (root if tied else 1.0)), head


def exported_parameters(model: nn.Module) -> int:
    """Prunable parameters of a model as `ArchSpec` counts them: all projections, without the biases of o and down.

    Those two belong to the residual stream, not to a unit.
    """
    counted = 0
    for name, parameter in model.named_parameters():
        # Experts are stacked in one parameter that has the projection's name itself.
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        projection = module.rpartition(".")[2] if kind == "bias" else kind
        if projection in (*PROJECTIONS, *FUSED) and not (kind == "bias" and projection in ("o_proj", "down_proj")):
            counted += parameter.numel()
    return counted


def _projection(fold: Fold, linear: nn.Module, name: str, index: int) -> Iterator[tuple[str, Tensor]]:
    rows, columns, out_gate, in_gate = _sides(fold, name, index)
    weight = linear.weight.detach()[rows][:, columns].float()
    if f"{index}.{name}" in fold.lora:
        a, b = (t.detach().to(weight.device, torch.float32) for t in fold.lora[f"{index}.{name}"])
        weight = weight.addmm_(b[rows], a[:, columns], alpha=fold.scaling)
    scale = fold.norm_scale if fold.spec.qk_norm and name in ("q_proj", "k_proj") else 1.0
    if fold.spec.qk_norm == "width" and name in ("q_proj", "k_proj"):
        scale /= _width_scale(fold, name, index)
    out_scale = scale if out_gate is None else scale * out_gate[rows]
    weight = weight * (out_scale[:, None] if isinstance(out_scale, Tensor) else out_scale)
    yield "weight", weight if in_gate is None else weight * in_gate[columns]
    if linear.bias is not None:
        yield "bias", linear.bias.detach()[rows].float() * out_scale


def _sides(fold: Fold, name: str, index: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Kept rows and columns of a projection, and the full-size gates on its output and input."""
    kept, dim = fold.kept, fold.spec.head_dim
    if name in ("q_proj", "o_proj"):
        unit, gate = _expand(kept.heads[index], dim), fold.head_gate[index].repeat_interleave(dim)
    elif name in ("k_proj", "v_proj"):
        unit, gate = _expand(kept.kv_groups[index], dim), None
    else:
        expert = int(name.split(".")[1]) if fold.spec.experts > 1 else 0
        unit, gate = kept.ffn_of(index, expert), fold.ffn_gate[index].view(-1, fold.spec.ffn)[expert]
    if name.endswith(("o_proj", "down_proj")):
        added = fold.added_gates[int(name != "o_proj"), index]
        return kept.hidden, unit, fold.hidden_gate * (1.0 if fold.spec.norms_behind else added), gate
    # Gates act where units enter o_proj and down_proj; the residual stream arrives already gated.
    return unit, kept.hidden, None, None


def _expand(units: Tensor, size: int) -> Tensor:
    return (units[:, None] * size + torch.arange(size)).flatten()


def _norm(fold: Fold, norm: nn.Module, scale: float) -> Tensor:
    offset = fold.spec.norm_offset
    return (norm.weight.detach()[fold.kept.hidden].float() + offset) * scale - offset


def _width_scale(fold: Fold, name: str, index: int) -> float:
    """r = sqrt(n / n'), see the module's docstring; 1 where no head is left."""
    spec, kept = fold.spec, fold.kept
    whole, left = (spec.heads, kept.heads) if name == "q_proj" else (spec.kv_heads, kept.kv_groups)
    return math.sqrt(whole / max(1, len(left[index])))
