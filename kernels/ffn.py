"""A whole gated FFN in triton: y = down(act(gate(x))⊙up(x)), each of the three a masked LoRA projection.

One autograd function for what would be six: the kernels are those of the projections and two small ones, and a layer's
host time is that of its functions.
"""

import torch
from torch import Tensor

from nuteprune.kernels import pointwise
from nuteprune.kernels.launch import Operand, guard, in_rows
from nuteprune.kernels.masked_lora import ARGUMENTS, check_runs, compute, operand_gradients

_BLOCK = 1024
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


def _blocks(size: int) -> tuple[int]:
    return (-(-size // _BLOCK),)


def _opened(gate: Tensor, up: Tensor, gelu: bool, out: Tensor) -> Tensor:
    """act(gate)⊙up, into `out`."""
    if out.numel():
        with guard(gate):
            pointwise.gated[_blocks(out.numel())](gate, up, out, out.numel(), GELU=gelu, BLOCK=_BLOCK)
    return out


class GatedFfn(torch.autograd.Function):
    """y = P_down(h), h = act(P_gate(x))⊙P_up(x), with P the projections of `MaskedLoraLinears`.

    With dh from P_down: d_gate = dh⊙up⊙act'(gate) and d_up = dh⊙act(gate) go on through P_gate and P_up; what they give
    to dx is added. Saved: x, gate, up, h, and for each projection what `MaskedLoraLinears` saves.

    Arguments: x, whether act is GELU (tanh) rather than SiLU, then 11 for each of gate, up and down.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gelu: bool, *args) -> Tensor:
        parts = [args[ARGUMENTS * i : ARGUMENTS * (i + 1)] for i in range(3)]
        needs = [ctx.needs_input_grad[2 + ARGUMENTS * i : 2 + ARGUMENTS * (i + 1)] for i in range(3)]
        flat = in_rows(x)
        (gate, u_gate), (up, u_up) = (compute(flat, *parts[i], keep_u=needs[i][3]) for i in (0, 1))
        opened = _opened(gate, up, gelu, torch.empty_like(gate))
        y, u_down = compute(opened, *parts[2], keep_u=needs[2][3])
        outputs = (gate, up, y)
        saved = [x, gate, up, opened]
        for part, need, u, output in zip(parts, needs, (u_gate, u_up, u_down), outputs, strict=True):
            saved += [part[0], *part[2:8], u, output if need[5] else None]
        ctx.save_for_backward(*saved)
        ctx.gelu, ctx.options = gelu, [part[8:] for part in parts]
        return y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, gate, up, opened, *saved = ctx.saved_tensors
        needs = [ctx.needs_input_grad[2 + ARGUMENTS * i : 2 + ARGUMENTS * (i + 1)] for i in range(3)]
        flat, small = in_rows(x), {}

        def through(index: int, source: Tensor, g: Tensor, need_x: bool, onto: Tensor | None = None) -> Tensor:
            weight, a, b, m_in, m_out, keep_in, keep_out, u, y = saved[9 * index : 9 * index + 9]
            op = Operand(source, weight, None, a, b, m_in, m_out, keep_in, keep_out, *ctx.options[index])
            wanted = [need_x, *needs[index][2:6]]
            dx, *small[index] = operand_gradients(g, u, None if y is None else in_rows(y), op, wanted, onto)
            return dx

        d_opened = through(2, opened, in_rows(grad), True)
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        if gate.numel():
            call = (d_opened, gate, up, d_gate, d_up, gate.numel())
            with guard(gate):
                pointwise.gated_backward[_blocks(gate.numel())](*call, GELU=ctx.gelu, BLOCK=_BLOCK)
        dx = through(0, flat, d_gate, ctx.needs_input_grad[0])
        dx = through(1, flat, d_up, ctx.needs_input_grad[0], dx)
        found = [g for i in range(3) for g in (None, None, *small[i], *[None] * 5)]
        return dx if dx is None or dx.dim() == x.dim() else dx.view(x.shape), None, *found


def gated_ffn(x: Tensor, gate: tuple, up: tuple, down: tuple, gelu: bool) -> Tensor:
    """y of `GatedFfn`; gate and up give the same units, in the same order, as down takes.

    Args:
        x: [..., D].
        gate, up, down: arguments of `Operand` behind x.
        gelu: GELU in its form with tanh instead of SiLU.

    Raises:
        ValueError: as `masked_lora_linear`.
    """
    for part in (gate, up, down):
        check_runs(x, part[0])
    if torch.is_grad_enabled():
        return GatedFfn.apply(x, gelu, *gate, *up, *down)
    flat = in_rows(x)
    opened, other = (compute(flat, *part, keep_u=False)[0] for part in (gate, up))
    y = compute(_opened(opened, other, gelu, opened), *down, keep_u=False)[0]
    return y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[-1])
