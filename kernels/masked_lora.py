"""The masked LoRA projection in triton: its autograd function.

Letters: M tokens, K inputs, N outputs, R rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nuteprune.kernels.launch import column_reduce, empty_u, in_rows, matmul, skinny
from nuteprune.kernels.product import Product
from nuteprune.kernels.tuning import INTERPRETING

LEAVES = 4
"""Arguments of a product that may need a gradient beside x: `Product.leaves`."""
_adding = False


@contextmanager
def into_grad() -> Iterator[None]:
    """Inside, backward adds the gradients of LoRA to their `.grad`, where there is one in float32, past autograd.

    The sums are those of `Tensor.backward`, without a tensor and an addition for each; `autograd.grad` finds none.
    """
    global _adding
    before, _adding = _adding, True
    try:
        yield
    finally:
        _adding = before


def _sum(leaf: Tensor | None) -> Tensor | None:
    """The gradient so far, where this one is to be added to it."""
    if not _adding or leaf is None or not leaf.is_leaf:
        return None
    grad = leaf.grad
    return grad if grad is not None and grad.dtype == torch.float32 else None


def gradients(
    grad: Tensor, u: Tensor | None, y: Tensor | None, product: Product, x: Tensor, needs: Sequence[bool],
    onto: Tensor | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """[dx, dA, dB, dm_in, dm_out] of a product of x; None for what `needs` does not name.

    Args:
        grad: of y, with rows at equal distances, as x has them.
        u: (x⊙m_in)Aᵀ, for dB; y is for dm_out.
        onto: dx is added to it.
    """
    need_x, need_a, need_b, need_in, need_out = needs
    dx = gb = d_a = d_b = d_in = d_out = None
    # With a gate on dx the kernel has no registers left for the sum, and the gate's gradient wants this product alone.
    alone = product.in_gate is not None
    if need_x or need_in:
        dx, gb = matmul(product.back, grad, need_a, lasting=False, onto=None if alone else onto)
    elif need_a:
        gb = skinny(product.back, grad, empty_u(product.back, grad, lasting=False))
    if need_a or need_in:
        q, t = gb if need_a else None, dx if need_in else None
        total = _sum(product.a)
        d_a, d_in = column_reduce(x, q, t, product.compact_in, product.inner, product.scaling, True, total)
    if need_b or need_out:
        q, t = u if need_b else None, y if need_out else None
        total = _sum(product.b)
        d_b, d_out = column_reduce(grad, q, t, product.compact_out, product.outer, product.scaling, False, total)
    if onto is not None and alone:
        dx = onto.add_(dx)
    return [dx if need_x else None, d_a, d_b, d_in, d_out]


def is_traced(x: Tensor) -> bool:
    """Whether there is nothing to launch on: under torch.compile, or a tensor without values."""
    return torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor)


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

    Arguments: the products, x in any number of dimensions, then the leaves of each product.
    """

    @staticmethod
    def forward(ctx, products: tuple[Product, ...], x: Tensor, *_leaves: Tensor | None):
        needs, flat = ctx.needs_input_grad, in_rows(x)
        outputs, saved = [], [x]
        ctx.set_materialize_grads(False)
        for number, product in enumerate(products):
            first = 2 + LEAVES * number
            y, u = matmul(product, flat, needs[first + 1], needs[first + 1])
            outputs.append(shaped(y, x))
            saved += [u, outputs[-1] if needs[first + 3] else None]
        ctx.products = products
        ctx.save_for_backward(*saved)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        needs, flat, dx, found = ctx.needs_input_grad, in_rows(x), None, []
        for number, (product, grad) in enumerate(zip(ctx.products, grads, strict=True)):
            if grad is None:
                found += [None] * LEAVES
                continue
            u, y = saved[2 * number : 2 * number + 2]
            first = 2 + LEAVES * number
            wanted = (needs[1], *needs[first : first + LEAVES])
            dx, *small = gradients(in_rows(grad), u, None if y is None else in_rows(y), product, flat, wanted, dx)
            found += small
        return None, dx if dx is None else shaped(dx, x), *found


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """y [M, N] in as many dimensions as x."""
    return y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[-1])


def masked_lora_linear(x: Tensor, *args) -> Tensor:
    """The triton path, with the resolved positional arguments of `Product`.

    Raises:
        ValueError: a dtype, device or size that the kernels cannot take.
    """
    if is_traced(x):
        from nuteprune.kernels import traced

        check_runs(x, args[0])
        return traced.TracedLoraLinear.apply(x, *args)
    return masked_lora_linears(x, (product_of(*args),))[0]


def masked_lora_linears(x: Tensor, products: tuple[Product, ...]) -> tuple[Tensor, ...]:
    """The outputs of several products of one x."""
    if not torch.is_grad_enabled():
        flat = in_rows(x)
        return tuple(shaped(matmul(product, flat, keep_u=False, lasting=False)[0], x) for product in products)
    found = MaskedLoraLinears.apply(products, x, *chain.from_iterable(product.leaves for product in products))
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
