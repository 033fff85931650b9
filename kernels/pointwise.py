"""The triton kernels beside the projections: RMSNorm, rotary positions, the gated activation.

Each is one pass over its rows where eager torch makes five to twenty; sums and products are fp32, rounded once at the
end. Letters: M tokens, D hidden, F FFN units, P head dimension. As in `triton_kernels`, only functions that triton
implements natively are used.
"""

import triton
import triton.language as tl


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _tile(M, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, 1] of a program (64 bits wide: rows times features can pass 2³¹), columns [1, BLOCK], which exist."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    return rows, cols, (rows < M) & (cols < D)


@triton.jit
def rms_norm(
    x, weight, y, M, D, eps, offset, stride_x, ROUND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y = (weight + offset)⊙x̂, x̂ = x / sqrt(mean(x²) + eps), over rows of D; ROUND: x̂ to y's type in between."""
    rows, cols, ok = _tile(M, D, ROWS, BLOCK)
    tile = tl.load(x + (rows * stride_x + cols), mask=ok, other=0.0).to(tl.float32)
    mean = tl.reduce(tile * tile, 1, _add)[:, None] / D
    tile *= tl.rsqrt(mean + eps)
    if ROUND:
        tile = tile.to(y.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32) + offset
    tl.store(y + (rows * D + cols), (tile * scale).to(y.dtype.element_ty), mask=ok)


@triton.jit
def rms_norm_backward(
    grad, x, weight, dx, M, D, eps, offset, stride_g, stride_x, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dx = (g̃ − x̂·mean(g̃⊙x̂)) / sqrt(mean(x²) + eps) with g̃ = (weight + offset)⊙grad; the rest as in `rms_norm`."""
    rows, cols, ok = _tile(M, D, ROWS, BLOCK)
    tile = tl.load(x + (rows * stride_x + cols), mask=ok, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.reduce(tile * tile, 1, _add)[:, None] / D + eps)
    tile *= inverse
    scale = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32) + offset
    g = tl.load(grad + (rows * stride_g + cols), mask=ok, other=0.0).to(tl.float32) * scale
    g -= tile * (tl.reduce(g * tile, 1, _add)[:, None] / D)
    tl.store(dx + (rows * D + cols), (g * inverse).to(dx.dtype.element_ty), mask=ok)


@triton.jit
def rotary(
    q, k, cos, sin, q_out, k_out, T, heads, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_qob, stride_qoh, stride_qot, stride_kob, stride_koh, stride_kot, stride_cb, stride_ct,
    P: tl.constexpr, HALF: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """q and k [B, H, T, P] turned by their positions' cos and sin [B, T, P]; TRANSPOSED: the gradient's way back.

    One program: ROWS tokens of one head of one sequence. The heads of k, if there are any, come behind those of q.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if head < heads:
        source = q + batch * stride_qb + head * stride_qh
        target = q_out + batch * stride_qob + head * stride_qoh
        step_in = stride_qt
        step_out = stride_qot
    else:
        source = k + batch * stride_kb + (head - heads) * stride_kh
        target = k_out + batch * stride_kob + (head - heads) * stride_koh
        step_in = stride_kt
        step_out = stride_kot
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = tl.arange(0, HALF)[None, :]
    half = P // 2
    ok = (rows < T) & (cols < half)
    first = tl.load(source + (rows * step_in + cols), mask=ok, other=0.0).to(tl.float32)
    second = tl.load(source + (rows * step_in + cols + half), mask=ok, other=0.0).to(tl.float32)
    angles = batch * stride_cb + rows * stride_ct + cols
    cos_first = tl.load(cos + angles, mask=ok, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angles + half, mask=ok, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angles, mask=ok, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angles + half, mask=ok, other=0.0).to(tl.float32)
    if TRANSPOSED:
        turned_first = first * cos_first + second * sin_second
        turned_second = second * cos_second - first * sin_first
    else:
        turned_first = first * cos_first - second * sin_first
        turned_second = second * cos_second + first * sin_second
    tl.store(target + (rows * step_out + cols), turned_first.to(q_out.dtype.element_ty), mask=ok)
    tl.store(target + (rows * step_out + cols + half), turned_second.to(q_out.dtype.element_ty), mask=ok)


@triton.jit
def _activation(x, GELU: tl.constexpr):
    """(act(x), act'(x)): SiLU x·σ(x), or GELU in its form with tanh."""
    if GELU:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0)
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return 0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope
    else:  # triton compiles only one of the two
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def gated(gate, up, y, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """y = act(gate)⊙up, elementwise."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < size
    opened, _ = _activation(tl.load(gate + at, mask=ok, other=0.0).to(tl.float32), GELU)
    value = opened * tl.load(up + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=ok)


@triton.jit
def gated_backward(grad, gate, up, d_gate, d_up, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """d_gate = grad⊙up⊙act'(gate), d_up = grad⊙act(gate)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < size
    g = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
    opened, slope = _activation(tl.load(gate + at, mask=ok, other=0.0).to(tl.float32), GELU)
    u = tl.load(up + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(d_gate + at, (g * u * slope).to(d_gate.dtype.element_ty), mask=ok)
    tl.store(d_up + at, (g * opened).to(d_up.dtype.element_ty), mask=ok)
