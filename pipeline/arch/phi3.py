"""Phi-3, Phi-3.5 and Phi-4: q, k and v in one linear layer, gate and up in another; Mistral otherwise."""

from nuteprune.arch.base import ArchSpec, Family, read_llama_like

_LONG = "its scaled rotary positions (longrope) are checked against hidden size / heads, so both must stay"
_STOCK = "only the stock class knows its rotary positions; use uniform"


def read(config) -> ArchSpec:
    refuses: list[tuple[str, str]] = []
    scaled = config.rope_parameters["rope_type"] != "default"
    if scaled:
        refuses += [(kind, _LONG) for kind in ("heads", "kv_groups", "hidden")]
    if scaled or config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        refuses += [(shape, _STOCK) for shape in ("per_layer", "per_layer_ffn")]
    return read_llama_like(config, fused=True, refuses=tuple(refuses))


FAMILY = Family("phi3", read, ragged_class="MistralConfig")
