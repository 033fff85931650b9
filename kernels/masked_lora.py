"""The masked LoRA projection in triton: custom ops (for torch.compile and meta tensors) and the autograd function.

Letters: M tokens, K inputs, N outputs, R rank.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nuteprune.kernels.launch import Operand, Small, column_reduce, in_rows, matmul, skinny
from nuteprune.kernels.torch_path import rows
from nuteprune.kernels.tuning import INTERPRETING

_OPERAND = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? in_gate, Tensor? out_gate, "
    "Tensor? keep_in, Tensor? keep_out, float scaling, bool compact_in, bool compact_out"
)


def compute(*operand, keep_u: bool = True) -> tuple[Tensor, Tensor | None]:
    """(y, u) of the arguments of `Operand`; u = (x⊙m_in)Aᵀ is what backward needs for dB."""
    return matmul(Operand(*operand), keep_u)


def gradients(grad: Tensor, u: Tensor | None, y: Tensor | None, *args) -> list[Tensor | None]:
    """[dx, dA, dB, dm_in, dm_out] of the arguments of `Operand`; None for what `needs`, the last, does not name."""
    *operand, (need_x, need_a, need_b, need_in, need_out) = args
    op = Operand(*operand)
    dx = gb = d_a = d_b = d_in = d_out = None
    if need_x or need_in:
        dx, gb = matmul(op.transposed(grad), need_a)
    elif need_a:
        gb = skinny(op.transposed(grad))
    if need_a or need_in:
        side = Small(op.in_gate, op.keep_in, op.a)
        q, t = gb if need_a else None, dx if need_in else None
        d_a, d_in = column_reduce(op.x, q, t, op.compact_in, side, op.scaling, across=True)
    if need_b or need_out:
        side = Small(op.out_gate, op.keep_out, op.b)
        q, t = u if need_b else None, y if need_out else None
        d_b, d_out = column_reduce(grad, q, t, op.compact_out, side, op.scaling, across=False)
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


class MaskedLoraLinear(torch.autograd.Function):
    """y = ((x⊙m_in)Wᵀ + s u Bᵀ + b)⊙m_out with u = (x⊙m_in)Aᵀ, over the kept units only.

    With g = ∂L/∂y and v = (g⊙m_out)B:
        dx     = ((g⊙m_out)W + s v A)⊙m_in      (the forward's kernel, W, A and B transposed)
        dA     = s vᵀ(x⊙m_in)
        dB     = s (g⊙m_out)ᵀ u
        dm_in  = Σ_m x⊙dx / m_in                (dx carries m_in once)
        dm_out = Σ_m g⊙y / m_out                (y carries m_out once)
    and 0 at units whose gate is 0 or that are removed. W and b get none. Saved: x, W itself (ZeRO-3 partitions it in
    between), A, B, the gates, the index lists, u [M, R], and y only when out_gate needs a gradient (do not modify y in
    place then). Gates multiply in fp32; sums are fp32.

    Arguments: those of `Operand`, x in any number of dimensions.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *args) -> Tensor:
        if is_traced(x):
            y, u = forward_op(rows(x), *args)
        else:
            y, u = compute(in_rows(x), *args, keep_u=ctx.needs_input_grad[4])
        if y.dim() != x.dim():
            y = y.view(*x.shape[:-1], y.shape[-1])
        if any(ctx.needs_input_grad):
            _save(ctx, x, args, u, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, u, y = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4, 5, 6)]
        traced = is_traced(grad)
        flat, run = (rows, backward_op) if traced else (in_rows, gradients)
        y = None if y is None else flat(y)
        u = grad.new_empty(0) if traced and u is None else u
        operand = (flat(x), weight, None, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, *ctx.options)
        grads = run(flat(grad), u, y, *operand, needs)
        d_x, d_a, d_b, d_in, d_out = (d if need else None for d, need in zip(grads, needs, strict=True))
        if d_x is not None and d_x.dim() != x.dim():
            d_x = d_x.view(x.shape)
        return d_x, None, None, d_a, d_b, d_in, d_out, None, None, None, None, None


def _save(ctx, x: Tensor, args: tuple, u: Tensor | None, y: Tensor) -> None:
    weight, _, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, *options = args
    saved_y = y if ctx.needs_input_grad[6] else None
    ctx.save_for_backward(x, weight, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, u, saved_y)
    ctx.options = options


def masked_lora_linear(x: Tensor, weight: Tensor, *args) -> Tensor:
    """The triton path, with the resolved positional arguments of `Operand`.

    Raises:
        ValueError: a dtype, device or size that the kernels cannot take.
    """
    check_runs(x, weight)
    return MaskedLoraLinear.apply(x, weight, *args)


def check_runs(x: Tensor, weight: Tensor) -> None:
    """ValueError if the kernels cannot take these operands."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f'the triton kernels take float32, float16 and bfloat16, not {x.dtype}: use backend="torch"')
    if x.device.type == "cpu" and not INTERPRETING:
        raise ValueError('the triton kernels need a GPU: use backend="torch" on CPU (or TRITON_INTERPRET=1 to debug)')
    if weight.numel() >= 2**31:
        raise ValueError(f'weight {list(weight.shape)} is too large for 32-bit offsets: use backend="torch"')
