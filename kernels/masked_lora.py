"""The masked LoRA projection in triton: custom ops (for torch.compile and meta tensors) and the autograd function.

Letters: M tokens, K inputs, N outputs, R rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nuteprune.kernels.launch import Operand, Small, column_reduce, empty_u, in_rows, matmul, skinny
from nuteprune.kernels.torch_path import rows
from nuteprune.kernels.tuning import INTERPRETING

_OPERAND = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? in_gate, Tensor? out_gate, "
    "Tensor? keep_in, Tensor? keep_out, float scaling, bool compact_in, bool compact_out"
)


ARGUMENTS = 11
"""Arguments of a projection behind x: those of `Operand`."""
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
    return leaf.grad if leaf.grad is not None and leaf.grad.dtype == torch.float32 else None


def compute(*operand, keep_u: bool = True) -> tuple[Tensor, Tensor | None]:
    """(y, u) of the arguments of `Operand`; u = (x⊙m_in)Aᵀ is what backward needs for dB."""
    return matmul(Operand(*operand), keep_u, lasting=keep_u)


def gradients(grad: Tensor, u: Tensor | None, y: Tensor | None, *args) -> list[Tensor | None]:
    """[dx, dA, dB, dm_in, dm_out] of the arguments of `Operand`; None for what `needs`, the last, does not name."""
    *operand, needs = args
    return operand_gradients(grad, u, y, Operand(*operand), needs)


def operand_gradients(
    grad: Tensor, u: Tensor | None, y: Tensor | None, op: Operand, needs, onto: Tensor | None = None
) -> list[Tensor | None]:
    """`gradients`; dx is added to `onto` if that is given."""
    need_x, need_a, need_b, need_in, need_out = needs
    dx = gb = d_a = d_b = d_in = d_out = None
    # With a gate on dx the kernel has no registers left for the sum, and the gate's gradient wants this product alone.
    alone = op.in_gate is not None
    if need_x or need_in:
        dx, gb = matmul(op.transposed(grad), need_a, lasting=False, onto=None if alone else onto)
    elif need_a:
        back = op.transposed(grad)
        gb = skinny(back, empty_u(back, lasting=False))
    if need_a or need_in:
        side = Small(op.in_gate, op.keep_in, op.a, _sum(op.a))
        q, t = gb if need_a else None, dx if need_in else None
        d_a, d_in = column_reduce(op.x, q, t, op.compact_in, side, op.scaling, across=True)
    if need_b or need_out:
        side = Small(op.out_gate, op.keep_out, op.b, _sum(op.b))
        q, t = u if need_b else None, y if need_out else None
        d_b, d_out = column_reduce(grad, q, t, op.compact_out, side, op.scaling, across=False)
    if onto is not None and alone:
        dx = onto.add_(dx)
    return [dx if need_x else None, d_a, d_b, d_in, d_out]


# For torch.compile and tensors without values. In eager mode their dispatch would be most of a small layer's time.


@torch.library.custom_op("nuteprune::masked_lora_forward", mutates_args=(), schema=f"({_OPERAND}) -> (Tensor, Tensor)")
def forward_op(*args) -> tuple[Tensor, Tensor]:
    """`compute`; u is of size 0 without LoRA."""
    y, u = compute(*args)
    return y, y.new_empty(args[0].shape[0], 0) if u is None else u


@forward_op.register_fake
def _fake_outputs(
    x, weight, bias, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, scaling, compact_in, compact_out
):
    n = keep_out.shape[0] if compact_out else weight.shape[0]
    rank = 0 if lora_a is None else lora_a.shape[0]
    return x.new_empty(x.shape[0], n), x.new_empty(x.shape[0], rank)


@torch.library.custom_op(
    "nuteprune::masked_lora_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor u, Tensor? y, {_OPERAND}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(grad: Tensor, *args) -> tuple[Tensor, ...]:
    """`gradients`; an empty tensor for each that `needs` does not name (an op's outputs may not share memory)."""
    return tuple(grad.new_empty(0) if d is None else d for d in gradients(grad, *args))


@backward_op.register_fake
def _(grad, u, y, x, weight, bias, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, scaling, ci, co, needs):
    leaves = (x, lora_a, lora_b, in_gate, out_gate)
    return tuple(
        leaf.new_empty(leaf.shape) if need else grad.new_empty(0) for need, leaf in zip(needs, leaves, strict=True)
    )


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
    and 0 at units whose gate is 0 or that are removed. W and b get none. Saved: x, W itself (ZeRO-3 partitions it in
    between), A, B, the gates, the index lists, u [M, R], and y only when out_gate needs a gradient (do not modify y in
    place then). Gates multiply in fp32; sums are fp32.

    Arguments: x in any number of dimensions, then those of `Operand` behind x for each projection.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *args):
        traced, needs = is_traced(x), ctx.needs_input_grad
        flat = rows(x) if traced else in_rows(x)
        outputs, saved, ctx.options = [], [x], []
        ctx.set_materialize_grads(False)
        for start in range(0, len(args), ARGUMENTS):
            one = args[start : start + ARGUMENTS]
            y, u = forward_op(flat, *one) if traced else compute(flat, *one, keep_u=needs[start + 4])
            outputs.append(y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[-1]))
            saved += [one[0], *one[2:8], u, outputs[-1] if needs[start + 6] else None]
            ctx.options.append(one[8:])
        if any(needs):
            ctx.save_for_backward(*saved)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        traced, needs, dx, found = is_traced(x), ctx.needs_input_grad, None, []
        flat = rows if traced else in_rows
        for number, grad in enumerate(grads):
            if grad is None:
                found += [None] * ARGUMENTS
                continue
            weight, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, u, y = saved[9 * number : 9 * number + 9]
            operand = (flat(x), weight, None, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out)
            first = 1 + ARGUMENTS * number
            wanted = [needs[0], *needs[first + 2 : first + 6]]
            g, y = flat(grad), None if y is None else flat(y)
            if traced:
                u = grad.new_empty(0) if u is None else u
                results = backward_op(g, u, y, *operand, *ctx.options[number], wanted)
                own, *small = (d if need else None for d, need in zip(results, wanted, strict=True))
                dx = own if dx is None else dx + own
            else:
                dx, *small = operand_gradients(g, u, y, Operand(*operand, *ctx.options[number]), wanted, dx)
            found += [None, None, *small, *[None] * 5]
        return dx if dx is None or dx.dim() == x.dim() else dx.view(x.shape), *found


def masked_lora_linear(x: Tensor, weight: Tensor, *args) -> Tensor:
    """The triton path, with the resolved positional arguments of `Operand`.

    Raises:
        ValueError: a dtype, device or size that the kernels cannot take.
    """
    return masked_lora_linears(x, [(weight, *args)])[0]


def masked_lora_linears(x: Tensor, projections: Sequence[tuple]) -> tuple[Tensor, ...]:
    """The outputs of several projections of one x, each given by the arguments of `Operand` behind x.

    Raises:
        ValueError: as `masked_lora_linear`.
    """
    for projection in projections:
        check_runs(x, projection[0])
    if not (torch.is_grad_enabled() or is_traced(x)):
        flat = in_rows(x)
        found = (compute(flat, *projection, keep_u=False)[0] for projection in projections)
        return tuple(y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[-1]) for y in found)
    found = MaskedLoraLinears.apply(x, *chain.from_iterable(projections))
    return (found,) if isinstance(found, Tensor) else found


def check_runs(x: Tensor, weight: Tensor) -> None:
    """ValueError if the kernels cannot take these operands."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f'the triton kernels take float32, float16 and bfloat16, not {x.dtype}: use backend="torch"')
    if x.device.type == "cpu" and not INTERPRETING:
        raise ValueError('the triton kernels need a GPU: use backend="torch" on CPU (or TRITON_INTERPRET=1 to debug)')
    if weight.numel() >= 2**31:
        raise ValueError(f'weight {list(weight.shape)} is too large for 32-bit offsets: use backend="torch"')
