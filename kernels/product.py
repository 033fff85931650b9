"""One masked LoRA product as the launchers see it: all that stays the same from call to call, found once.

Letters: M tokens, K inputs (summed), N outputs, R rank; n and k are the kept ones.
"""

from functools import cached_property
from typing import Any

from torch import Tensor

PLANS = 32
"""Launches that a product remembers. An expert gets another number of tokens each time: of thousands of experts all of
them would fill the host's memory."""


class Side:
    """One side of a product, as far as its small gradients go.

    Attributes:
        gate, keep: the side's gate and kept units.
        outer: the LoRA matrix of this side, [units, R] or its transpose; None without LoRA.
    """

    __slots__ = ("gate", "keep", "outer")

    def __init__(self, gate: Tensor | None, keep: Tensor | None, outer: Tensor | None):
        self.gate, self.keep, self.outer = gate, keep, outer


class Product:
    """y = ((x⊙m_in)Wᵀ + s((x⊙m_in)Aᵀ)Bᵀ + b)⊙m_out without its x: what a projection of one view computes with.

    With `whole`, a pair of which a and b are the last ranks, it computes with that; a and b get the gradient.
    w [N, K], a [R, K] and b [N, R] have any strides; `swapped`: what is there is each one's transpose, and only the
    strides are read the other way round (a view of each would cost more than a small kernel).

    Attributes:
        outputs, rank: N, R (0 without LoRA).
        kept: (n, k).
        w_strides: of w along its outputs and its inputs.
        before, after: the pointers in front of and behind those of u and y in a launch.
        strides: of w, a and b, as a launch takes them.
        learned: ranks of the pair that gets the gradient: all of them, or the last ones of `whole`.
        leaves: what may need a gradient beside x: A, B, m_in, m_out.
        plans: how it was launched of late, by what `launch.matmul` was given.
    """

    def __init__(
        self, w: Tensor, bias: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None,
        in_gate: Tensor | None = None, out_gate: Tensor | None = None, keep_in: Tensor | None = None,
        keep_out: Tensor | None = None, scaling: float = 1.0, compact_in: bool = False, compact_out: bool = False,
        whole: tuple[Tensor, Tensor] | None = None, swapped: bool = False,
    ):  # fmt: skip
        self.leaves = (a, b, in_gate, out_gate)
        self.learned = 0 if a is None else a.shape[1 if swapped else 0]
        a, b = whole or (a, b)
        self.w, self.bias, self.a, self.b = w, bias, a, b
        self.in_gate, self.out_gate, self.keep_in, self.keep_out = in_gate, out_gate, keep_in, keep_out
        self.scaling, self.compact_in, self.compact_out, self.swapped = scaling, compact_in, compact_out, swapped
        n, k = w.shape[::-1] if swapped else w.shape
        self.outputs = n
        self.rank = 0 if a is None else a.shape[1 if swapped else 0]
        self.kept = (n if keep_out is None else keep_out.shape[0], k if keep_in is None else keep_in.shape[0])
        self.w_strides = self._strides(w)
        self.before, self.after = (w, bias, a, b), (in_gate, out_gate, keep_in, keep_out)
        lora = (0, 0, 0, 0) if a is None or b is None else (*self._strides(a), *self._strides(b))
        self.strides = (*self.w_strides, *lora)
        self.plans: dict[tuple, Any] = {}

    def _strides(self, matrix: Tensor) -> tuple[int, ...]:
        """Strides of w, a or b as the product reads it."""
        strides = matrix.stride()
        return strides[::-1] if self.swapped else strides

    def remember(self, place: tuple, plan: Any) -> None:
        """Keep how it was launched, in place of all that it kept before where that is `PLANS`."""
        if len(self.plans) == PLANS:
            self.plans.clear()
        self.plans[place] = plan

    @cached_property
    def back(self) -> "Product":
        """The product that gives dx from g [M, N]: same expression, roles of inputs and outputs swapped."""
        return Product(self.w, None, self.b, self.a, self.out_gate, self.in_gate, self.keep_out, self.keep_in,
                       self.scaling, self.compact_out, self.compact_in, None, not self.swapped)  # fmt: skip

    @cached_property
    def skinny(self) -> "Product":
        """u = (x⊙m_in)Aᵀ as a product without LoRA: A in W's place."""
        assert self.a is not None
        return Product(self.a, None, None, None, self.in_gate, None, self.keep_in, None, self.scaling,
                       self.compact_in, True, None, self.swapped)  # fmt: skip

    @cached_property
    def inner(self) -> Side:
        """The side of A and m_in."""
        return Side(self.in_gate, self.keep_in, self.leaves[0])

    @cached_property
    def outer(self) -> Side:
        """The side of B and m_out."""
        return Side(self.out_gate, self.keep_out, self.leaves[1])

    @property
    def scattered(self) -> bool:
        """Whether an index list runs along the contiguous dimension of x or W: their tiles hold an offset per element.

        A list of whole rows is loaded in vectors as without one.
        """
        gathers_x = self.keep_in is not None and not self.compact_in
        along_k = self.keep_in is not None and self.w_strides[1] == 1
        along_n = self.keep_out is not None and self.w_strides[0] == 1
        return gathers_x or along_k or along_n
