"""The masked LoRA projection on CPU, and wherever triton cannot run.

Gates are folded into the weight's rows and columns rather than into the activations: removing units copies the kept
part of the weight anyway, and the folded form needs no activation-sized temporary forward or backward. Those copies
live only inside one forward or one backward; autograd keeps the Parameter itself, because ZeRO-3 partitions it between.
"""

from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = 11  # operands behind the weight, `whole` the last of them
BLOCK = 1 << 17  # elements of a block in the sums over tokens: 512 KiB in fp32


class Folded(NamedTuple):
    """Kept part of one projection with its gates multiplied in; k and n are the kept inputs and outputs."""

    weight: Tensor  # [n, k], plus the LoRA product where `merged`
    lora_a: Tensor | None  # [R, k]
    lora_b: Tensor | None  # [n, R], scaling included
    in_gate: Tensor | None  # [k]
    out_gate: Tensor | None  # [n]
    merged: bool


def rows(tensor: Tensor) -> Tensor:
    """[..., D] as [M, D]; -1 would be ambiguous where D is 0."""
    return tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])


def pick(tensor: Tensor | None, dim: int, keep: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None:
        return None
    return (tensor if keep is None else tensor.index_select(dim, keep)).to(dtype)


def spread(tensor: Tensor, dim: int, keep: Tensor | None, size: int) -> Tensor:
    """The inverse of `pick`: zeros where a unit was removed."""
    if keep is None:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size
    if dim == 0:
        return tensor.new_zeros(shape).index_copy_(0, keep, tensor)
    # scatter_ is about 1.7 times as fast as index_copy_ along the last dimension on CPU
    return tensor.new_zeros(shape).scatter_(1, keep.expand(tensor.shape[0], -1), tensor)


def _scale(tensor: Tensor, factor: Tensor, owned: bool) -> Tensor:
    return tensor.mul_(factor) if owned else tensor * factor


def _merge_pays(weight: Tensor, tokens: int) -> bool:
    """Whether W + sBA costs less than two skinny products per token, and rounds no worse.

    In 16 bits a small LoRA update would vanish in the rounding of W, so it stays apart there.
    """
    n, k = weight.shape
    return weight.dtype in (torch.float32, torch.float64) and n * k <= tokens * (n + k)


def fold(
    weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, in_gate: Tensor | None, out_gate: Tensor | None,
    keep_in: Tensor | None, keep_out: Tensor | None, scaling: float, tokens: int,
) -> Folded:  # fmt: skip
    """Kept rows and columns of W [N, K], A [R, K], B [N, R] with gates and scaling multiplied in."""
    dtype = weight.dtype
    w = pick(pick(weight, 0, keep_out, dtype), 1, keep_in, dtype)
    assert w is not None
    a, b = pick(lora_a, 1, keep_in, dtype), pick(lora_b, 0, keep_out, dtype)
    m_in, m_out = pick(in_gate, 0, keep_in, dtype), pick(out_gate, 0, keep_out, dtype)
    owned = w is not weight
    merged = a is not None and _merge_pays(w, tokens)
    if merged:
        w = w.addmm_(b, a, alpha=scaling) if owned else torch.addmm(w, b, a, alpha=scaling)
        owned = True
    if m_in is not None:
        w, owned = _scale(w, m_in, owned), True
        a = None if a is None else a * m_in
    if m_out is not None:
        w = _scale(w, m_out[:, None], owned)
    if b is not None:
        b = b * scaling if m_out is None else b * (m_out * scaling)[:, None]
    return Folded(w, a, b, m_in, m_out, merged)


def _column_dots(p: Tensor, q: Tensor) -> Tensor:
    """Σ_m p⊙q [D], in fp32 at least.

    On CPU in blocks that stay in the cache: an activation-sized temporary costs more in page faults (6 ms for
    1,024 x 1,536 in fp32) than the sum itself (0.3 ms).
    """
    dtype = torch.promote_types(p.dtype, torch.float32)
    step = max(1, BLOCK // max(1, p.shape[1])) if p.device.type == "cpu" else max(1, p.shape[0])
    total = p.new_zeros(p.shape[1], dtype=dtype)
    for start in range(0, p.shape[0], step):
        block = slice(start, start + step)
        total += (p[block] * q[block]).sum(0, dtype=dtype)
    return total


def _gate_grad(value: Tensor, grad: Tensor, gate: Tensor, keep: Tensor | None, size: int) -> Tensor:
    """Σ_m value⊙grad / gate in the gate's dtype [size]; 0 where the gate is 0 or the unit removed.

    `value` and `grad` hold gate·v and ∂L/∂(gate·v) (in either order), so dividing by the gate leaves ∂L/∂gate.
    """
    total = _column_dots(value, grad)
    kept = pick(gate, 0, keep, total.dtype)
    return spread(torch.where(kept != 0, total / kept, torch.zeros_like(total)).to(gate.dtype), 0, keep, size)


class MaskedLoraLinear(torch.autograd.Function):
    """y = x W̃ᵀ + (x Ãᵀ) B̃ᵀ + b̃ with W̃ = m_out⊙W⊙m_in, Ã = A⊙m_in, B̃ = s·m_out⊙B, b̃ = m_out⊙b (kept units only).

    With g = ∂L/∂y:
        dx     = g W̃ + (g B̃) Ã
        dA     = (g B̃)ᵀ x ⊙ m_in
        dB     = s·m_out ⊙ gᵀ (x Ãᵀ)
        dm_in  = Σ_m x⊙dx / m_in          (x⊙dx carries m_in once)
        dm_out = Σ_m g⊙y / m_out          (y carries m_out once)
    and 0 at units whose gate is 0 or that are removed. W and b get none. With `whole`, a pair of which A and B are the
    last ranks, it computes with that, and dA and dB are those of A and B. Saved: x, W itself, A, B, the gates, the
    index lists, and y only when out_gate needs a gradient (do not modify y in place then).
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
        in_gate: Tensor | None, out_gate: Tensor | None, keep_in: Tensor | None, keep_out: Tensor | None,
        scaling: float, compact_in: bool, compact_out: bool, whole: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        flat = rows(x)
        if not compact_in:
            flat = pick(flat, 1, keep_in, x.dtype)
        a, b = whole or (lora_a, lora_b)
        f = fold(weight, a, b, in_gate, out_gate, keep_in, keep_out, scaling, flat.shape[0])
        b = pick(bias, 0, keep_out, x.dtype)
        if b is not None and f.out_gate is not None:
            b = b * f.out_gate
        y = F.linear(flat, f.weight, b)
        if f.lora_a is not None and f.lora_b is not None and not f.merged:
            y.addmm_((f.lora_a @ flat.t()).t(), f.lora_b.t())
        if not compact_out:
            y = spread(y, 1, keep_out, weight.shape[0])
        y = y.view(*x.shape[:-1], y.shape[-1])
        saved_y = y if ctx.needs_input_grad[6] else None
        ctx.save_for_backward(x, weight, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, saved_y)
        ctx.scaling, ctx.compact, ctx.whole = scaling, (compact_in, compact_out), whole
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, y = ctx.saved_tensors
        need_x, _, _, need_a, need_b, need_in, need_out = ctx.needs_input_grad[:7]
        (n, k), (compact_in, compact_out) = weight.shape, ctx.compact
        flat, g = rows(x), rows(grad)
        if not compact_in:
            flat = pick(flat, 1, keep_in, x.dtype)
        if not compact_out:
            g = pick(g, 1, keep_out, g.dtype)
        a, b = ctx.whole or (lora_a, lora_b)
        first = 0 if ctx.whole is None else len(a) - len(lora_a)
        f = fold(weight, a, b, in_gate, out_gate, keep_in, keep_out, ctx.scaling, flat.shape[0])
        # Skinny products are kept as [R, M]: measured in MKL, (B̃ᵀgᵀ) is 3 times as fast as gB̃, (uᵀg)ᵀ 8 times as gᵀu
        ga = f.lora_b.t() @ g.t() if f.lora_b is not None and (need_a or not f.merged) else None
        dx = d_a = d_b = d_in = d_out = None
        if need_x or need_in:
            dx = g @ f.weight
            if ga is not None and not f.merged:
                dx.addmm_(ga.t(), f.lora_a)
        if need_in:
            d_in = _gate_grad(flat, dx, in_gate, keep_in, k)
        if need_out:
            y = rows(y)
            y = y if compact_out else pick(y, 1, keep_out, y.dtype)
            d_out = _gate_grad(y, g, out_gate, keep_out, n)
        if need_a:
            assert ga is not None
            d_a = ga[first:] @ flat if f.in_gate is None else (ga[first:] @ flat).mul_(f.in_gate)
            d_a = spread(d_a, 1, keep_in, k).to(lora_a.dtype)
        if need_b:
            assert f.lora_a is not None
            d_b = ((f.lora_a[first:] @ flat.t()) @ g).t()
            d_b = d_b * (ctx.scaling if f.out_gate is None else (f.out_gate * ctx.scaling)[:, None])
            d_b = spread(d_b, 0, keep_out, n).to(lora_b.dtype)
        if need_x:
            assert dx is not None
            dx = (dx if compact_in else spread(dx, 1, keep_in, k)).view(x.shape)
        return dx if need_x else None, None, None, d_a, d_b, d_in, d_out, None, None, None, None, None, None


def torch_linear(x: Tensor, weight: Tensor, *operands) -> Tensor:
    """The torch path, with the resolved positional arguments of `MaskedLoraLinear.forward`."""
    return MaskedLoraLinear.apply(x, weight, *operands, *[None] * (WHOLE - len(operands)))
