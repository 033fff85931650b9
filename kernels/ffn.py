"""A whole gated FFN in triton: y = down(act(gate(x))⊙up(x)), each of the three a masked LoRA projection.

One autograd function for what would be six: the kernels are those of the projections and two small ones, and a layer's
host time is that of its functions.
"""

import torch
from torch import Tensor

from nuteprune.kernels import pointwise
from nuteprune.kernels.launch import in_rows, matmul, start
from nuteprune.kernels.masked_lora import LEAVES, Sums, apply_products, gradients, shaped
from nuteprune.kernels.product import Product

_BLOCK = 1024
_OPTIONS = {gelu: {"GELU": gelu, "BLOCK": _BLOCK} for gelu in (False, True)}


def _blocks(size: int) -> tuple[int]:
    return (-(-size // _BLOCK),)


def _opened(gate: Tensor, up: Tensor, gelu: bool, out: Tensor) -> Tensor:
    """act(gate)⊙up, into `out`."""
    size = out.numel()
    if size:
        start(pointwise.gated, _blocks(size), gate, (gate, up, out, size), _OPTIONS[gelu])
    return out


class GatedFfn(torch.autograd.Function):
    """y = P_down(h), h = act(P_gate(x))⊙P_up(x), with P the projections of `MaskedLoraLinears`.

    With dh from P_down: d_gate = dh⊙up⊙act'(gate) and d_up = dh⊙act(gate) go on through P_gate and P_up; what they give
    to dx is added. Saved: x, gate, up, h, and for each projection what `MaskedLoraLinears` saves.

    Arguments: the products gate, up and down, their `Sums`, whether act is GELU (tanh) rather than SiLU, x, then the
    leaves of each.
    """

    @staticmethod
    def forward(
        ctx, products: tuple[Product, ...], sums: tuple[Sums, ...], gelu: bool, x: Tensor, *_leaves: Tensor | None
    ) -> Tensor:
        needs, flat = ctx.needs_input_grad, in_rows(x)
        keep_u = [need or own is not None for need, own in zip(needs[5::LEAVES], sums, strict=True)]
        needs_out = needs[7::LEAVES]
        (gate, u_gate), (up, u_up) = (matmul(products[i], flat, keep_u[i], keep_u[i]) for i in (0, 1))
        opened = _opened(gate, up, gelu, torch.empty_like(gate))
        y, u_down = matmul(products[2], opened, keep_u[2], keep_u[2])
        us = [u if keep else None for u, keep in zip((u_gate, u_up, u_down), keep_u, strict=True)]
        outputs = [output if need else None for output, need in zip((gate, up, y), needs_out, strict=True)]
        ctx.save_for_backward(x, gate, up, opened, *us, *outputs)
        ctx.gelu, ctx.products, ctx.sums = gelu, products, sums
        return shaped(y, x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, gate, up, opened, *saved = ctx.saved_tensors
        needs, products, sums = ctx.needs_input_grad, ctx.products, ctx.sums
        flat, small = in_rows(x), {}

        def through(index: int, source: Tensor, g: Tensor, need_x: bool, onto: Tensor | None = None) -> Tensor:
            u, y, first = saved[index], saved[3 + index], 4 + LEAVES * index
            wanted = (need_x, *needs[first : first + LEAVES])
            dx, *small[index] = gradients(g, u, y, products[index], source, wanted, onto, sums[index])
            return dx

        d_opened = through(2, opened, in_rows(grad), True)
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        size = gate.numel()
        if size:
            call = (d_opened, gate, up, d_gate, d_up, size)
            start(pointwise.gated_backward, _blocks(size), gate, call, _OPTIONS[ctx.gelu])
        dx = through(0, flat, d_gate, needs[3])
        dx = through(1, flat, d_up, needs[3], dx)
        return None, None, None, dx if dx is None else shaped(dx, x), *small[0], *small[1], *small[2]


def gated_ffn(x: Tensor, products: tuple[Product, ...], gelu: bool) -> Tensor:
    """y of `GatedFfn`; gate and up give the same units, in the same order, as down takes.

    Args:
        x: [..., D].
        products: gate, up, down.
        gelu: GELU in its form with tanh instead of SiLU.
    """
    if torch.is_grad_enabled():
        return apply_products(GatedFfn, products, x, gelu)
    flat = in_rows(x)
    opened, other = (matmul(product, flat, keep_u=False, lasting=False)[0] for product in products[:2])
    y = matmul(products[2], _opened(opened, other, gelu, opened), keep_u=False, lasting=False)[0]
    return shaped(y, x)
