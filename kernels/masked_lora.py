"""The masked LoRA projection in triton: its autograd function.

Letters: M tokens, K inputs, N outputs, R rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nuteprune.kernels.launch import column_reduce, empty_u, in_rows, matmul, skinny
from nuteprune.kernels.product import Product
from nuteprune.kernels.tuning import INTERPRETING

LEAVES = 4
"""Arguments of a product that may need a gradient beside x: `Product.leaves`."""
Sums = tuple[Tensor, Tensor] | None
"""Gradients of A and B so far, float32, to which a product's are added; None: they go through autograd."""
_adding = False


@contextmanager
def into_grad() -> Iterator[None]:
    """What is computed inside adds the gradients of LoRA to their `.grad`, where both have one in float32.

    The sums are those of `Tensor.backward`, past autograd: without a tensor, a node and an addition for each.
    """
    global _adding
    before, _adding = _adding, True
    try:
        yield
    finally:
        _adding = before


def apply(function: type[torch.autograd.Function], *args):
    """`function.apply`, past its look for wrappers of torch.func in every argument."""
    return super(torch.autograd.Function, function).apply(*args)


def apply_products(function: type[torch.autograd.Function], products: tuple[Product, ...], x: Tensor, *options):
    """`function` of products, options, x and leaves: those that get their gradient through autograd."""
    sums = tuple(_sums(product) for product in products) if _adding and x.requires_grad else (None,) * len(products)
    leaves: list[Tensor | None] = []
    for product, own in zip(products, sums, strict=True):
        leaves += product.leaves if own is None else (None, None, *product.leaves[2:])
    return apply(function, products, sums, *options, x, *leaves)


def _sums(product: Product) -> Sums:
    a, b = product.leaves[:2]
    if a is None or b is None or not (a.requires_grad and a.is_leaf and b.requires_grad and b.is_leaf):
        return None
    grad_a, grad_b = a.grad, b.grad
    if grad_a is None or grad_b is None or not grad_a.dtype == grad_b.dtype == torch.float32:
        return None
    return grad_a, grad_b


def gradients(
    grad: Tensor, u: Tensor | None, y: Tensor | None, product: Product, x: Tensor, needs: Sequence[bool],
    onto: Tensor | None = None, sums: Sums = None,
) -> list[Tensor | None]:  # fmt: skip
    """[dx, dA, dB, dm_in, dm_out] of a product of x; None for what `needs` does not name.

    Args:
        grad: of y, with rows at equal distances, as x has them.
        u: (x⊙m_in)Aᵀ, for dB; y is for dm_out.
        onto: dx is added to it.
        sums: dA and dB are added to them.
    """
    need_x, need_a, need_b, need_in, need_out = needs
    sum_a, sum_b = (None, None) if sums is None else sums
    need_a, need_b = need_a or sums is not None, need_b or sums is not None
    dx = gb = d_a = d_b = d_in = d_out = None
    # With a gate on dx the kernel has no registers left for the sum, and the gate's gradient wants this product alone.
    alone = product.in_gate is not None
    if need_x or need_in:
        dx, gb = matmul(product.back, grad, need_a, lasting=False, onto=None if alone else onto)
    elif need_a:
        gb = skinny(product.back, grad, empty_u(product.back, grad, lasting=False))
    if product.learned < product.rank:
        gb, u = (None if t is None else t[:, -product.learned :] for t in (gb, u))
    if need_a or need_in:
        q, t = gb if need_a else None, dx if need_in else None
        d_a, d_in = column_reduce(x, q, t, product.compact_in, product.inner, product.scaling, True, sum_a)
    if need_b or need_out:
        q, t = u if need_b else None, y if need_out else None
        d_b, d_out = column_reduce(grad, q, t, product.compact_out, product.outer, product.scaling, False, sum_b)
    if onto is not None and alone:
        dx = onto.add_(dx)
    return [dx if need_x else None, d_a, d_b, d_in, d_out]


class MaskedLoraLinears(torch.autograd.Function):
    """One or more projections of one x: y = ((x⊙m_in)Wᵀ + s u Bᵀ + b)⊙m_out with u = (x⊙m_in)Aᵀ, kept units only.

    With g = ∂L/∂y and v = (g⊙m_out)B:
        dx     = ((g⊙m_out)W + s v A)⊙m_in      (the forward's kernel, W, A and B transposed; summed over projections)
        dA     = s vᵀ(x⊙m_in)
        dB     = s (g⊙m_out)ᵀ u
        dm_in  = Σ_m x⊙dx / m_in                (dx carries m_in once)
        dm_out = Σ_m g⊙y / m_out                (y carries m_out once)
    and 0 at units whose gate is 0 or that are removed. W and b get none. Saved: x, u [M, R], and y only when out_gate
    needs a gradient (do not modify y in place then); W (ZeRO-3 partitions it in between), A, B, the gates and the index
    lists are read again from the products. Gates multiply in fp32; sums are fp32.

    Arguments: the products, their `Sums`, x in any number of dimensions, then the leaves of each product.
    """

    @staticmethod
    def forward(ctx, products: tuple[Product, ...], sums: tuple[Sums, ...], x: Tensor, *_leaves: Tensor | None):
        needs, flat = ctx.needs_input_grad, in_rows(x)
        outputs, saved = [], [x]
        ctx.set_materialize_grads(False)
        for number, product in enumerate(products):
            first = 3 + LEAVES * number
            keep_u = sums[number] is not None or needs[first + 1]
            y, u = matmul(product, flat, keep_u, keep_u)
            outputs.append(shaped(y, x))
            saved += [u if keep_u else None, outputs[-1] if needs[first + 3] else None]
        ctx.products, ctx.sums = products, sums
        ctx.save_for_backward(*saved)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        needs, flat, dx, found = ctx.needs_input_grad, in_rows(x), None, []
        for number, grad in enumerate(grads):
            if grad is None:
                found += [None] * LEAVES
                continue
            u, y = saved[2 * number : 2 * number + 2]
            first = 3 + LEAVES * number
            wanted = (needs[2], *needs[first : first + LEAVES])
            y = None if y is None else in_rows(y)
            dx, *small = gradients(in_rows(grad), u, y, ctx.products[number], flat, wanted, dx, ctx.sums[number])
            found += small
        return None, None, dx if dx is None else shaped(dx, x), *found


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """y [M, N] in as many dimensions as x."""
    return y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[-1])


def triton_linear(x: Tensor, *args) -> Tensor:
    """The triton path, with the resolved positional arguments of `Product`.

    Raises:
        ValueError: a dtype, device or size that the kernels cannot take.
    """
    return triton_linears(x, (product_of(*args),))[0]


def triton_linears(x: Tensor, products: tuple[Product, ...]) -> tuple[Tensor, ...]:
    """The outputs of several products of one x."""
    if not torch.is_grad_enabled():
        flat = in_rows(x)
        return tuple(shaped(matmul(product, flat, keep_u=False, lasting=False)[0], x) for product in products)
    found = apply_products(MaskedLoraLinears, products, x)
    return (found,) if isinstance(found, Tensor) else found


def product_of(weight: Tensor, *args) -> Product:
    """The product of the positional arguments of `Product`.

    Raises:
        ValueError: a dtype, device or size that the kernels cannot take.
    """
    check_runs(weight, weight)
    return Product(weight, *args)


def check_runs(x: Tensor, weight: Tensor) -> None:
    """ValueError if the kernels cannot take these operands."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f'the triton kernels take float32, float16 and bfloat16, not {x.dtype}: use backend="torch"')
    if x.device.type == "cpu" and not INTERPRETING:
        raise ValueError('the triton kernels need a GPU: use backend="torch" on CPU (or TRITON_INTERPRET=1 to debug)')
    if weight.numel() >= 2**31:
        raise ValueError(f'weight {list(weight.shape)} is too large for 32-bit offsets: use backend="torch"')
