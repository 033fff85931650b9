"""Families of models: one small file each, which says its sizes, names and what an export of it is.

`read_spec` is the only way in. Knows configurations of transformers and nothing else of ours; every room may call it.
"""

from nuteprune.arch import (
    gemma3_text,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from nuteprune.arch.base import ATTENTION, FFN, FUSED, PROJECTIONS, ArchSpec, Family
from nuteprune.arch.fused import fuse, projections, split_fused, stored
from nuteprune.errors import UserError

_MODULES = (llama, mistral, qwen2, qwen3, granite, smollm3, phi3, olmo2, olmo3, gemma3_text, qwen3_moe, mixtral)

FAMILIES: dict[str, Family] = {m.FAMILY.model_type: m.FAMILY for m in _MODULES}


def family_of(config) -> Family:
    """The family of a transformers configuration; raises UserError naming the supported ones."""
    if config.model_type not in FAMILIES:
        raise UserError(f"model type '{config.model_type}' is not supported: use one of {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]


def read_spec(config) -> ArchSpec:
    """`ArchSpec` of a transformers configuration; raises UserError for an unsupported model type."""
    return family_of(config).read(config)
