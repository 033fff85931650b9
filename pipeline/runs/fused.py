"""LoRA of projections that the model holds in one linear layer (Phi-3), as `peft` wants it: one pair for that layer.

Parts of rank r become a pair of the sum of their ranks, exactly: A one below the other, B on the diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nuteprune.arch import FFN, FUSED, ArchSpec

BLOCKS = FFN, tuple(name for name, parts in FUSED.items() if set(parts) <= set(FFN))
"""Projections of the FFN, single and fused."""
Pair = tuple[Tensor, Tensor]


def fuse_lora(lora: Mapping[str, Pair], spec: ArchSpec) -> tuple[dict[str, Pair], dict]:
    """The pairs as the model's layers are, and what `unfuse_lora` has to know: outputs of the parts that had a pair.

    Args:
        lora: pairs (A [R, K], B [N, R]) by "layer.projection".
        spec: a model with fused layers.
    """
    values = spec.kv_heads * spec.head_dim
    outputs = {"q_proj": spec.heads * spec.head_dim, "k_proj": values, "v_proj": values,
               "gate_proj": spec.ffn, "up_proj": spec.ffn}  # fmt: skip
    fused = {key: pair for key, pair in lora.items() if key.partition(".")[2] not in outputs}
    found: dict[str, dict[str, int]] = {}
    for layer in {key.partition(".")[0] for key in lora}:
        for name, parts in FUSED.items():
            own = {part: lora[f"{layer}.{part}"] for part in parts if f"{layer}.{part}" in lora}
            if own:
                like = next(iter(own.values()))[1]
                blocks = [own[part][1] if part in own else like.new_zeros(outputs[part], 0) for part in parts]
                fused[f"{layer}.{name}"] = torch.cat([a for a, _ in own.values()]), torch.block_diag(*blocks)
                found[name] = {part: outputs[part] if part in own else -outputs[part] for part in parts}
    return fused, found


def unfuse_lora(lora: Mapping[str, Pair], found: Mapping[str, Mapping[str, int]]) -> dict[str, Pair]:
    """The inverse of `fuse_lora`; outputs of parts without a pair are negative."""
    single = {}
    for key, (a, b) in lora.items():
        layer, _, name = key.partition(".")
        if name not in found:
            single[key] = a, b
            continue
        own = [part for part, rows in found[name].items() if rows > 0]
        rank, row, column = a.shape[0] // len(own), 0, 0
        for part, rows in found[name].items():
            if rows > 0:
                columns = slice(column, column + rank)
                single[f"{layer}.{part}"] = a[columns].contiguous(), b[row : row + rows, columns].contiguous()
                column += rank
            row += abs(rows)
    return single


def patterns(lora: Mapping[str, Pair], rank: int, alpha: float) -> dict:
    """`rank_pattern` and `alpha_pattern` of peft's LoraConfig for pairs of another rank: alpha / rank stays."""
    ranks = {key.partition(".")[2]: len(a) for key, (a, _) in lora.items() if len(a) != rank}
    return {"rank_pattern": ranks, "alpha_pattern": {name: alpha * own / rank for name, own in ranks.items()}}
