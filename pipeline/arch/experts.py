"""The experts of a layer, which transformers stacks in two tensors, as linear layers of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from nuteprune.arch.base import FFN


class Expert(nn.Module):
    """One expert: an FFN of three `nn.Linear`; on a device with data they share the stacked tensors' memory.

    Args:
        base: transformers' experts of a layer.
        index: which of them.
    """

    def __init__(self, base: nn.Module, index: int):
        super().__init__()
        gate, up = base.gate_up_proj.detach()[index].chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = (
            _linear(weight) for weight in (gate, up, base.down_proj.detach()[index])
        )
        self.act_fn = base.act_fn

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] of the tokens that are routed here."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """Takes the place of transformers' experts of a layer."""

    def __init__(self, base: nn.Module):
        super().__init__(Expert(base, index) for index in range(base.num_experts))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum [N, D] of the experts that the router chose for each of N tokens.

        Tokens are put in the order of their experts and back, so that no two of them add to one place: the sum does not
        depend on the order in which a device works.

        Args:
            hidden_states: [N, D].
            top_k_index, top_k_weights: [N, k].
        """
        count = top_k_index.shape[1]
        order = top_k_index.flatten().argsort(stable=True)
        parts = hidden_states[order // count].split(_tokens_each(top_k_index, len(self)))
        out = torch.cat([expert(part) for expert, part in zip(self, parts, strict=True) if len(part)])
        out = out * top_k_weights.flatten()[order, None]
        return out[order.argsort()].unflatten(0, (-1, count)).sum(1).to(hidden_states.dtype)


def expert_projections(experts: Experts) -> dict[str, tuple[nn.Module, str]]:
    """Owner and attribute of each projection, by "experts.NUMBER.PROJECTION"."""
    return {f"experts.{i}.{name}": (expert, name) for i, expert in enumerate(experts) for name in FFN}


def stack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's state dict with its experts, whatever their numbers, stacked as transformers has them."""
    found: dict[str, dict[int, Tensor]] = {name: {} for name in FFN}
    for key in [key for key in state if key.startswith("mlp.experts.")]:
        _, _, number, name, _ = key.split(".")
        found[name][int(number)] = state.pop(key)
    gate, up, down = (torch.stack([each[number] for number in sorted(each)]) for each in found.values())
    return state | {"mlp.experts.gate_up_proj": torch.cat([gate, up], 1), "mlp.experts.down_proj": down}


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _tokens_each(index: Tensor, experts: int) -> list[int]:
    """How many tokens go to each expert; without values (a dry run): about as many to each."""
    if isinstance(index, FakeTensor):
        return [len(part) for part in torch.arange(index.numel()).tensor_split(experts)]
    return index.flatten().bincount(minlength=experts).tolist()
