"""A frozen linear layer with gates and LoRA around it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor, nn

from nuteprune.kernels.api import known_lists, product_of, projection_kernels

if TYPE_CHECKING:
    from nuteprune.kernels.product import Product


@dataclass(frozen=True)
class ProjectionState:
    """What one projection computes with.

    Gates are full-size; `keep_*` are sorted indices of the units that are not removed, None for all. A compact side
    carries only the kept units: the rows of kept heads out of q, k and v, the kept FFN units between up and down.
    With `whole`, a pair of which `lora` is the last ranks, it computes with that; `lora` gets the gradient.
    """

    lora: tuple[Tensor, Tensor] | None = None
    scaling: float = 1.0
    in_gate: Tensor | None = None
    out_gate: Tensor | None = None
    keep_in: Tensor | None = None
    keep_out: Tensor | None = None
    compact_in: bool = False
    compact_out: bool = False
    whole: tuple[Tensor, Tensor] | None = None

    @cached_property
    def operands(self) -> tuple:
        """The arguments of `kernels.api.known_lists` behind x, the weight and its bias."""
        gates, lists = (self.in_gate, self.out_gate), (self.keep_in, self.keep_out)
        options = self.scaling, self.compact_in, self.compact_out, self.whole
        return *(self.lora or (None, None)), *gates, *lists, *options


class MaskedLoRALinear(nn.Module):
    """y = ((x⊙m_in)Wᵀ + s((x⊙m_in)Aᵀ)Bᵀ + b)⊙m_out with W and b frozen; m, A, B come from the active view.

    The module holds frozen weights only. The student's LoRA lives outside of it (`fresh_lora`), so that ZeRO-3
    partitions the base and leaves LoRA whole on every rank.

    Args:
        base: the `nn.Linear` it replaces; its parameters are shared, not copied.
    """

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.state = ProjectionState()
        self.beside: tuple[MaskedLoRALinear, ...] = ()
        self._ready: tuple[Tensor, Tensor] | None = None
        """An input and what comes of it, computed with that of the projection before."""

    @property
    def operands(self) -> tuple:
        """The arguments of `kernels.api.known_lists` behind x."""
        return self.weight, self.bias, *self.state.operands

    @property
    def product(self) -> Product:
        """The same for the kernels, made once for each state."""
        own = self.state.__dict__
        made = own.get("_product")
        if made is None or made[0] is not self:
            made = own["_product"] = self, product_of(*self.operands)
        return made[1]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] (or its kept columns) to [..., N] (or the kept rows).

        With projections `beside` it, which are called next and with the same x, theirs is computed too.
        """
        own = self.__dict__  # `nn.Module.__setattr__` takes 20 times as long
        ready = own["_ready"]
        if ready is not None:
            own["_ready"] = None
            if ready[0] is x:
                return ready[1]
        call = projection_kernels(x)
        if call is None:
            return known_lists(x, *self.operands)
        if not self.beside:
            return call(x, (self.product,))[0]
        outputs = call(x, (self.product, *(module.product for module in self.beside)))
        for module, y in zip(self.beside, outputs[1:], strict=True):
            module.__dict__["_ready"] = (x, y)
        return outputs[0]
