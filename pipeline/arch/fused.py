"""A layer's projections; those that it holds in one linear layer are split into parameters of their own, and fused."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nuteprune.arch.base import ATTENTION, FFN, FUSED
from nuteprune.arch.experts import Experts, expert_projections, stack


def projections(layer: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """For each of the seven projections of a decoder layer: the module that owns it and its attribute name there.

    Fused ones are split first, see `split_fused`. Those of experts are named "experts.NUMBER.PROJECTION".
    """
    split_fused(layer)
    experts = getattr(layer.mlp, "experts", None)
    owners = {} if experts is None else expert_projections(experts)
    for block, names in ((layer.self_attn, ATTENTION), (layer.mlp, FFN if experts is None else ())):
        owners.update({name: (block, name) for name in names})
        for fused, parts in FUSED.items():
            if hasattr(block, fused):
                owners.update({name: (getattr(block, fused), name) for name in parts})
    return owners


class _Parts(tuple):
    """The outputs of the parts, for a caller that would cut them out of one tensor: nothing is copied.

    Where units are removed their widths are not those that the caller reckons with, so a cut is known by its place: the
    first has no start, the last no end.
    """

    def __getitem__(self, cut) -> Tensor:
        columns = cut[-1]
        return tuple.__getitem__(self, 0 if columns.start is None else -1 if columns.stop is None else 1)

    def chunk(self, count: int, dim: int) -> tuple[Tensor, ...]:
        assert count == len(self)
        assert dim == -1
        return tuple(self)


class Fused(nn.Module):
    """A fused linear layer as one `nn.Linear` per projection; on a device with data they share its memory.

    Args:
        base: the fused layer.
        sizes: rows of each projection, by name and in order.

    Attributes:
        rows: the rows of the fused weight that are each projection's.
    """

    def __init__(self, base: nn.Linear, sizes: Mapping[str, int]):
        super().__init__()
        self.rows: dict[str, slice] = {}
        start = 0
        for name, size in sizes.items():
            self.rows[name] = rows = slice(start, start + size)
            part = nn.Linear(base.in_features, size, bias=base.bias is not None, device="meta")
            part.weight = nn.Parameter(base.weight.detach()[rows], requires_grad=False)
            if base.bias is not None:
                part.bias = nn.Parameter(base.bias.detach()[rows], requires_grad=False)
            setattr(self, name, part)
            start += size
        assert start == base.out_features

    def forward(self, x: Tensor) -> _Parts:
        """x [..., D] to the projections' outputs."""
        return _Parts(getattr(self, name)(x) for name in self.rows)


def split_fused(layer: nn.Module) -> None:
    """Split the fused projections and the stacked experts of a decoder layer in place; no weight is copied."""
    experts = getattr(layer.mlp, "experts", None)
    if experts is not None and not isinstance(experts, Experts):
        layer.mlp.experts = Experts(experts)
    for block in (layer.self_attn, layer.mlp):
        for fused, names in FUSED.items():
            base = getattr(block, fused, None)
            if isinstance(base, nn.Linear):
                setattr(block, fused, Fused(base, dict(zip(names, _sizes(block, base, names), strict=True))))


def _sizes(block: nn.Module, base: nn.Linear, names: tuple[str, ...]) -> list[int]:
    if len(names) == 2:
        return [base.out_features // 2] * 2
    values = block.num_key_value_heads * block.head_dim
    return [base.out_features - 2 * values, values, values]


def stored(layer: nn.Module, key: str) -> tuple[str, slice]:
    """The name in the model's files, and the rows there, of the parameter `key` of a split layer."""
    owner, _, part = key.rpartition(".")
    module, _, name = owner.rpartition(".")
    fused = layer.get_submodule(module)
    return (f"{module}.{part}", fused.rows[name]) if isinstance(fused, Fused) else (key, slice(None))


def fuse(state: dict[str, Tensor], layer: nn.Module) -> dict[str, Tensor]:
    """A state dict of single projections as `layer` names them: those that it fuses, below each other."""
    state = dict(state)
    if hasattr(layer.mlp, "experts"):
        state = stack(state)
    for block in ("self_attn", "mlp"):
        for fused, names in FUSED.items():
            if hasattr(getattr(layer, block), fused):
                for part in ("weight", "bias"):
                    found = [state.pop(f"{block}.{name}.{part}", None) for name in names]
                    if found[0] is not None:
                        state[f"{block}.{fused}.{part}"] = torch.cat(found)
    return state
