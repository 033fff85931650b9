"""An exported model as one GGUF file, which llama.cpp and everything built on it load.

Architectures of LLaMA, Mistral and Qwen2: `llama` (uniform) and `deci` (layers with sizes of their own). Qwen2 is
`qwen2` while its heads are as wide as its hidden size, as that architecture wants, else one of the former two, which
take its biases. All others: `gguf_families.py`. Read in llama.cpp's `src/models/deci.cpp`, and held against by
`make check-llamacpp`:
- the head size is taken from the file only if the first layer has attention;
- a layer without FFN loses its attention, and as the last one breaks the output.
So what llama.cpp would get wrong is written as a sublayer of zeros, the smallest there is: the same function.
FFN widths are filled up with units of zeros to whole blocks, for its kernels are slow on other rows and q8_0 has none.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nuteprune.arch import ArchSpec
from nuteprune.errors import UserError
from nuteprune.exporting.gguf_families import (
    ACTIVATIONS,
    ARCHITECTURES,
    BLOCK,
    CHECKED,
    NEIGHBOURS,
    SILU,
    activation_of,
    add_family,
    has_window,
    lacks,
    rope_of,
    single,
    whole_blocks,
)
from nuteprune.exporting.gguf_vocab import write_vocabulary
from nuteprune.exporting.modeling_ragged import RaggedConfig

log = logging.getLogger(__name__)

FILE = "model.gguf"
TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""Of matrices, by the values of export.gguf; vectors stay float32."""
WITHOUT = "export without export.gguf"


def gguf_architecture(spec: ArchSpec, shape: str, config: PreTrainedConfig) -> str:
    """llama.cpp's architecture for a family in a shape.

    Raises:
        UserError: it has none, or lacks something that the model needs.
    """
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3") or _scaled_anew(rope) or rope.get("mscale"):
        raise UserError(f"llama.cpp does not rotate positions as this model does (rope_type {kind}): {WITHOUT}")
    if spec.family not in (*CHECKED, *ARCHITECTURES):
        known = ", ".join((*CHECKED, *ARCHITECTURES))
        raise UserError(f"{spec.family} was never held against llama.cpp, which is written of {known}: {WITHOUT}")
    if (activation := activation_of(config)) not in ACTIVATIONS.get(spec.family, SILU):
        raise UserError(f"llama.cpp's {spec.family} has another activation in its FFN than this model's {activation}: "
                        f"{WITHOUT}")  # fmt: skip
    if spec.family in CHECKED:
        if shape != "uniform":
            return "deci"
        whole = config.num_attention_heads * config.head_dim == config.hidden_size
        return "qwen2" if spec.family == "qwen2" and whole else "llama"
    if shape != "uniform":
        raise UserError(
            f"llama.cpp holds {spec.family} only where all layers are alike: use export.shape=uniform, or {WITHOUT}"
        )
    if lack := lacks(spec, config):
        raise UserError(f"llama.cpp's {spec.family} has no {lack}, as this model has: {WITHOUT}")
    return ARCHITECTURES[spec.family]


def write_gguf(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, architecture: str, quantisation: str
) -> None:
    """Write `model.gguf` beside the model's other files.

    Args:
        directory: of the export.
        model: the exported model.
        tokenizer: its tokenizer.
        architecture: from `gguf_architecture`.
        quantisation: a key of `TYPES`.

    Raises:
        UserError: weights too large for float16, or a tokenizer that llama.cpp does not know.
    """
    config, (kind, file_type) = model.config, TYPES[quantisation]
    layers = _layers(config)
    writer = gguf.GGUFWriter(directory / FILE, architecture)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config, layers, architecture)
    _add_rope(writer, config)
    write_vocabulary(writer, tokenizer, config.vocab_size)
    # Shapes first, then one tensor at a time: the file is never held in memory.
    state = model.state_dict()
    for name, tensor in _tensors({key: t.to("meta") for key, t in state.items()}, config, layers, architecture):
        stored = _type_of(tensor, kind)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, stored)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in _tensors(state, config, layers, architecture):
        data, stored = tensor.float().contiguous().numpy(), _type_of(tensor, kind)
        if stored == gguf.GGMLQuantizationType.F16 and np.abs(data).max() > np.finfo(np.float16).max:
            raise UserError(f"{name} is too large for float16: use export.gguf=f32")
        writer.write_tensor_data(gguf.quantize(data, stored).view(np.uint8))
    writer.close()
    log.info("%s: architecture %s, %s", FILE, architecture, quantisation)


def _type_of(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """How a tensor is stored: vectors as float32, and rows that are no whole blocks as float16."""
    if tensor.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


@dataclass(frozen=True)
class _Layer:
    """A layer of the file: query heads of each KV group and FFN width, and which sublayer is made of zeros."""

    groups: list[int]
    ffn: int
    no_attention: bool
    no_ffn: bool

    @property
    def even(self) -> list[int]:
        """For each KV head of the file, which all have as many query heads, the group that it comes from."""
        share = math.gcd(*self.groups)
        return [g for g, count in enumerate(self.groups) for _ in range(count // share)]


def _layers(config: PreTrainedConfig) -> list[_Layer]:
    """The layers of the file; see the module's docstring for the sublayers of zeros."""
    if isinstance(config, RaggedConfig):
        sizes = [config.layer_sizes(index) for index in range(config.num_hidden_layers)]
    else:
        group = config.num_attention_heads // config.num_key_value_heads
        sizes = [([group] * config.num_key_value_heads, config.intermediate_size)] * config.num_hidden_layers
    # A bias stays where its sublayer is gone.
    o_bias, down_bias = (getattr(config, name, False) for name in ("attention_bias", "mlp_bias"))
    layers = []
    for index, (groups, ffn) in enumerate(sizes):
        heads = groups or ([1] if index == 0 or o_bias else [])
        width = whole_blocks(ffn) or (BLOCK if heads or index == len(sizes) - 1 or down_bias else 0)
        layers.append(_Layer(heads, width, not groups, not ffn))
    return layers


def _add_sizes(writer: gguf.GGUFWriter, config: PreTrainedConfig, layers: list[_Layer], architecture: str) -> None:
    """Every size; lists with one entry for each layer where the architecture takes them."""
    heads, kv_heads = [sum(layer.groups) for layer in layers], [len(layer.even) for layer in layers]
    ffn = [layer.ffn for layer in layers]
    single = architecture != "deci"
    window = getattr(config, "sliding_window", None)
    if window and "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        window = None
    if has_window(config):
        window = None
    if window and window < config.max_position_embeddings:
        log.warning("%s: llama.cpp has no sliding window here, so its context ends with the window of %d tokens",
                    FILE, window)  # fmt: skip
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(window or config.max_position_embeddings, config.max_position_embeddings))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads[0] if single else heads)
    writer.add_head_count_kv(kv_heads[0] if single else kv_heads)
    writer.add_feed_forward_length(ffn[0] if single else ffn)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_family(writer, config)


def _add_rope(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """How positions rotate; the frequencies of `llama3` are a tensor."""
    rope = rope_of(config)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    scaling = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}.get(rope["rope_type"])
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key):
                getattr(writer, f"add_rope_scaling_yarn_{key}")(float(rope[key]))


def _scaled_anew(rope: dict) -> bool:
    """Whether yarn scales attention by another factor than llama.cpp finds itself."""
    factor = rope.get("attention_factor")
    own = 0.1 * math.log(rope.get("factor", 1.0)) + 1
    return factor is not None and not math.isclose(float(factor), own, rel_tol=1e-4)


def _rope_factors(config: PreTrainedConfig) -> Tensor:
    """By how much `llama3` slows each frequency [P/2], out of transformers' own function."""
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    return plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]


def _tensors(
    state: Mapping[str, Tensor], config: PreTrainedConfig, layers: list[_Layer], architecture: str
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the file, in its order."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, len(layers))
    if rope_of(config)["rope_type"] == "llama3":
        yield "rope_freqs.weight", _rope_factors(config)
    whole = {**state, **_zeros(state, config, layers)}.items()
    for key, tensor in (part for pair in whole for part in single(*pair, config)):
        if key == "lm_head.weight" and config.tie_word_embeddings and architecture != "olmo2":
            continue
        parts = key.split(".")
        projection = parts[-2]
        if projection in ("q_proj", "k_proj", "v_proj"):
            layer, rows = layers[int(parts[2])], tensor.unflatten(0, (-1, config.head_dim))
            if projection != "q_proj":
                rows = torch.stack([rows[group] for group in layer.even])
            if projection != "v_proj" and architecture in NEIGHBOURS:
                rows = rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            tensor = rows.flatten(0, 1)
        elif projection in ("gate_proj", "up_proj") or key.endswith("down_proj.weight"):
            tensor = _filled_up(tensor, -1 if projection == "down_proj" or tensor.ndim == 1 else -2)
        yield names.get_name(key, try_suffixes=(".weight", ".bias")), tensor


def _filled_up(tensor: Tensor, dim: int) -> Tensor:
    """The tensor with zeros up to whole blocks of FFN units, which are its dimension `dim`."""
    shape = list(tensor.shape)
    shape[dim] = whole_blocks(shape[dim]) - shape[dim]
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)


def _zeros(state: Mapping[str, Tensor], config: PreTrainedConfig, layers: list[_Layer]) -> dict[str, Tensor]:
    """The tensors of the sublayers of zeros by transformers' names."""
    like, hidden, head = state["model.norm.weight"], config.hidden_size, config.head_dim
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        shapes: dict[str, tuple[int, ...]] = {}
        if layer.no_attention and layer.groups:
            shapes |= {f"self_attn.{name}_proj": (head, hidden) for name in "qkv"}
            shapes |= {"self_attn.o_proj": (hidden, head), "input_layernorm": (hidden,)}
        if layer.no_ffn and layer.ffn:
            shapes |= {f"mlp.{name}_proj": (layer.ffn, hidden) for name in ("gate", "up")}
            shapes |= {"mlp.down_proj": (hidden, layer.ffn), "post_attention_layernorm": (hidden,)}
        found |= {f"model.layers.{index}.{name}.weight": like.new_zeros(shape) for name, shape in shapes.items()}
    return found
