"""The masked LoRA projection in triton: custom ops (for torch.compile and meta tensors) and the autograd function.

Letters: M tokens, K inputs, N outputs, R rank.
"""

import torch
from torch import Tensor

from nuteprune.kernels.launch import Operand, column_reduce, matmul, skinny
from nuteprune.kernels.torch_path import rows, spread
from nuteprune.kernels.tuning import INTERPRETING

_OPERAND = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? in_gate, Tensor? out_gate, "
    "Tensor? keep_in, Tensor? keep_out, float scaling, bool compact_in, bool compact_out"
)


@torch.library.custom_op("nuteprune::masked_lora_forward", mutates_args=(), schema=f"({_OPERAND}) -> (Tensor, Tensor)")
def forward_op(*args) -> tuple[Tensor, Tensor]:
    """(y [M, N or n], u [M, R]) for x [M, K or k]; u = (x⊙m_in)Aᵀ is what backward needs for dB."""
    return matmul(Operand(*args))


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
def backward_op(grad: Tensor, u: Tensor, y: Tensor | None, *args) -> tuple[Tensor, ...]:
    """(dx, dA, dB, dm_in, dm_out); an empty tensor for each that `needs` (in this order) does not name."""
    *operand, (need_x, need_a, need_b, need_in, need_out) = args
    op = Operand(*operand)
    dx = gb = None
    d_a, d_b, d_in, d_out = (grad.new_empty(0) for _ in range(4))  # an op's outputs may not share memory
    if need_x or need_in:
        dx, gb = matmul(op.transposed(grad))
    elif need_a:
        gb = skinny(op.transposed(grad))
    if need_a or need_in:
        q, t = gb if need_a else None, dx if need_in else None
        d_a, d_in = _small_grads(op.x, q, t, op.in_gate, op.keep_in, op.compact_in, op.w.shape[1], op.scaling)
    if need_b or need_out:
        q, t = u if need_b else None, y if need_out else None
        d_b, d_out = _small_grads(grad, q, t, op.out_gate, op.keep_out, op.compact_out, op.w.shape[0], op.scaling)
    return dx if need_x else grad.new_empty(0), d_a.t().contiguous() if need_a else d_a, d_b, d_in, d_out


@backward_op.register_fake
def _(grad, u, y, x, weight, bias, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, scaling, ci, co, needs):
    (n, k), rank = weight.shape, 0 if lora_a is None else lora_a.shape[0]
    shapes = (x.shape, (rank, k), (n, rank), (k,), (n,))
    dtypes = (x.dtype, *(torch.float32,) * 4)
    return tuple(
        grad.new_empty(shape if need else (0,), dtype=dtype if need else grad.dtype)
        for need, shape, dtype in zip(needs, shapes, dtypes, strict=True)
    )


def _small_grads(
    p: Tensor,
    q: Tensor | None,
    t: Tensor | None,
    gate: Tensor | None,
    keep: Tensor | None,
    compact: bool,
    size: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """(s·gate⊙pᵀq [size, R], Σ_m p⊙t / gate [size]) in fp32, zeros at removed units; empty where q or t is None.

    t holds gate·v (or p does), so dividing leaves ∂L/∂gate; exact zeros get 0.
    """
    outer, dots = column_reduce(p, q, t, keep, compact)
    kept = None if gate is None else (gate if keep is None else gate.index_select(0, keep)).float()[:, None]
    if q is not None:
        outer = spread(outer * scaling if kept is None else outer * (kept * scaling), 0, keep, size)
    if t is not None:
        kept = kept[:, 0]
        dots = spread(torch.where(kept != 0, dots / kept, torch.zeros_like(dots)), 0, keep, size)
    return outer if q is not None else p.new_empty(0), dots if t is not None else p.new_empty(0)


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
        y, u = forward_op(rows(x), *args)
        y = y.view(*x.shape[:-1], y.shape[-1])
        _save(ctx, x, args, u, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _student_grads(ctx, grad)


def _save(ctx, x: Tensor, args: tuple, u: Tensor, y: Tensor) -> None:
    weight, _, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, *options = args
    saved_y = y if ctx.needs_input_grad[6] else None
    ctx.save_for_backward(x, weight, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, u, saved_y)
    ctx.options = options


def _student_grads(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of `Operand`'s twelve fields, each in the dtype of its leaf."""
    x, weight, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, u, y = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 3, 4, 5, 6)]
    y = None if y is None else rows(y)
    operand = (rows(x), weight, None, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, *ctx.options)
    grads = backward_op(rows(grad), u, y, *operand, needs)
    leaves = (x, lora_a, lora_b, in_gate, out_gate)
    d_x, d_a, d_b, d_in, d_out = (
        d.to(leaf.dtype) if need else None for d, leaf, need in zip(grads, leaves, needs, strict=True)
    )
    d_x = None if d_x is None else d_x.view(x.shape)
    return d_x, None, None, d_a, d_b, d_in, d_out, None, None, None, None, None


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
