"""The triton kernels: one masked LoRA matmul for y and for dx, one column reduction for the small gradients.

y = ((x⊙m_in)Wᵀ + s((x⊙m_in)Aᵀ)Bᵀ + b)⊙m_out and dx = ((g⊙m_out)W + s((g⊙m_out)B)A)⊙m_in are the same expression with
(W, A, B) transposed, so one kernel serves both: the launcher swaps strides. Likewise dB with dm_out and dA with dm_in.

Letters: M tokens, K inputs (summed), N outputs, R rank. Optional pointers are None: triton folds them away at compile
time. Only functions that triton implements natively are used (no tl.zeros, tl.sum, tl.cdiv): those written in triton
itself cannot be interpreted when somebody imported triton before TRITON_INTERPRET was set.
"""

import triton
import triton.language as tl


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + ab in fp32; the interpreter's bf16 dot is wrong, so it gets fp32 operands."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _tile_of(pid, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Tile number to (row, column), GROUP rows at a time: programs that run together share W in the L2 cache."""
    width = GROUP * n_tiles
    first = pid // width * GROUP
    height = tl.minimum(m_tiles - first, GROUP)
    return first + pid % width % height, pid % width // height


@triton.jit
def _add_lora(
    acc, u_tile, b, units, col_ok, ranks, rank, scaling, stride_bn, stride_br,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """acc + s·u Bᵀ for some ranks. s goes into B, so that one accumulator serves both products."""
    b_ptr = b + (units[None, :] * stride_bn + ranks[:, None] * stride_br)
    b_tile = tl.load(b_ptr, mask=(ranks < rank)[:, None] & col_ok[None, :], other=0.0)
    b_tile = (b_tile.to(tl.float32) * scaling).to(u_tile.dtype)
    return _dot(u_tile, b_tile, acc, PRECISION, INTERPRET)


@triton.jit
def matmul(
    x, w, bias, a, b, u, y, in_gate, out_gate, k_index, n_index, M, n_kept, k_kept, rank, scaling, stride_xm, stride_xk,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_ym,
    COMPACT_X: tl.constexpr, COMPACT_Y: tl.constexpr, GATHER_ROWS: tl.constexpr, FUSE_U: tl.constexpr,
    ADD: tl.constexpr, EVEN_K: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y (or, with strides swapped, dx) over the kept units only; one program a [BM, BN] tile.

    u = (x⊙m_in)Aᵀ [M, rank] is computed beside it (FUSE_U: rank <= RANK, stored once) or read, RANK columns at a time.
    ADD: what y holds is added, as where several projections share their input.
    """
    pid_m, pid_n = _tile_of(tl.program_id(0), (M + BM - 1) // BM, (n_kept + BN - 1) // BN, 8)
    # Tokens times features can pass 2³¹, so the tile's first row is a 64-bit shift of the base pointer; offsets inside
    # a tile and inside W stay 32 bits wide, for scattered tiles keep one per element in registers.
    first = pid_m.to(tl.int64) * BM
    rows = tl.arange(0, BM)
    row_ok = first + rows < M
    cols = pid_n * BN + tl.arange(0, BN)
    col_ok = cols < n_kept
    units = cols
    if n_index is not None:
        units = tl.load(n_index + cols, mask=col_ok, other=0).to(tl.int32)
    ranks = tl.arange(0, RANK)
    rank_ok = ranks < rank
    acc = tl.full([BM, BN], 0.0, tl.float32)
    u_acc = tl.full([BM, RANK], 0.0, tl.float32)
    x += first * stride_xm
    if u is not None:
        u += first * rank
    y += first * stride_ym
    for k0 in range(0, k_kept, BK):
        ks = k0 + tl.arange(0, BK)
        k_ok = ks < k_kept
        sources = ks
        if k_index is not None:
            sources = tl.load(k_index + ks, mask=k_ok, other=0).to(tl.int32)
        x_cols = sources
        if COMPACT_X:
            x_cols = ks
        x_ok = row_ok[:, None] if EVEN_K else row_ok[:, None] & k_ok[None, :]
        x_tile = tl.load(x + (rows[:, None] * stride_xm + x_cols[None, :] * stride_xk), mask=x_ok, other=0.0)
        if in_gate is not None:
            gate = tl.load(in_gate + sources, mask=k_ok, other=0.0).to(tl.float32)
            x_tile = (x_tile.to(tl.float32) * gate[None, :]).to(x_tile.dtype)
        # Lanes follow a tile's last dimension where they cannot see which one is contiguous: a gather along W's
        # contiguous inputs is loaded as W lies, or 32 lanes would read 32 rows.
        if GATHER_ROWS:
            w_ptr = w + (units[:, None] * stride_wn + sources[None, :] * stride_wk)
            w_ok = col_ok[:, None] if EVEN_K else col_ok[:, None] & k_ok[None, :]
            w_tile = tl.trans(tl.load(w_ptr, mask=w_ok, other=0.0).to(x_tile.dtype))
        else:
            w_ptr = w + (units[None, :] * stride_wn + sources[:, None] * stride_wk)
            w_ok = col_ok[None, :] if EVEN_K else col_ok[None, :] & k_ok[:, None]
            w_tile = tl.load(w_ptr, mask=w_ok, other=0.0).to(x_tile.dtype)
        acc = _dot(x_tile, w_tile, acc, PRECISION, INTERPRET)
        if FUSE_U:
            if GATHER_ROWS:
                a_ptr = a + (ranks[:, None] * stride_ar + sources[None, :] * stride_ak)
                a_tile = tl.trans(tl.load(a_ptr, mask=rank_ok[:, None] & k_ok[None, :], other=0.0).to(x_tile.dtype))
            else:
                a_ptr = a + (ranks[None, :] * stride_ar + sources[:, None] * stride_ak)
                a_tile = tl.load(a_ptr, mask=rank_ok[None, :] & k_ok[:, None], other=0.0).to(x_tile.dtype)
            u_acc = _dot(x_tile, a_tile, u_acc, PRECISION, INTERPRET)
    if FUSE_U:
        u_tile = u_acc.to(x.dtype.element_ty)
        if u is not None:  # noqa: SIM102 - triton decides the one when it compiles, the other when it runs
            if pid_n == 0:
                tl.store(u + (rows[:, None] * rank + ranks[None, :]), u_tile, mask=row_ok[:, None] & rank_ok[None, :])
        acc = _add_lora(acc, u_tile, b, units, col_ok, ranks, rank, scaling, stride_bn, stride_br, PRECISION, INTERPRET)
    elif b is not None:
        for r0 in range(0, rank, RANK):
            some = r0 + ranks
            u_ok = row_ok[:, None] & (some < rank)[None, :]
            u_tile = tl.load(u + (rows[:, None] * rank + some[None, :]), mask=u_ok, other=0.0)
            acc = _add_lora(
                acc, u_tile, b, units, col_ok, some, rank, scaling, stride_bn, stride_br, PRECISION, INTERPRET
            )
    if bias is not None:
        acc += tl.load(bias + units, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    if out_gate is not None:
        acc *= tl.load(out_gate + units, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    targets = units
    if COMPACT_Y:
        targets = cols
    y_ptr = y + (rows[:, None] * stride_ym + targets[None, :])
    y_ok = row_ok[:, None] & col_ok[None, :]
    if ADD:
        acc += tl.load(y_ptr, mask=y_ok, other=0.0).to(tl.float32)
    tl.store(y_ptr, acc.to(y.dtype.element_ty), mask=y_ok)


@triton.jit
def column_reduce(
    p, q, t, outer, dots, index, M, kept, rank, chunk, stride_pm, stride_pc, stride_tm, stride_tc, stride_qm,
    COMPACT: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Over `chunk` rows: outer[split, c, r] = Σ_m p[m, c]·q[m, r] and dots[split, c] = Σ_m p[m, c]·t[m, c].

    dB and dm_out with (p, q, t) = (g, u, y); dA and dm_in with (x, gB, dx). q or t may be None. The grid's last axis is
    over RANK ranks each; the first of those programs writes the dots.
    """
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    col_ok = cols < kept
    split = tl.program_id(1)
    units = cols
    if index is not None and not COMPACT:
        units = tl.load(index + cols, mask=col_ok, other=0).to(tl.int32)
    ranks = tl.program_id(2) * RANK + tl.arange(0, RANK)
    first_ranks = tl.program_id(2) == 0
    outer_acc = tl.full([BC, RANK], 0.0, tl.float32)
    dots_acc = tl.full([BM, BC], 0.0, tl.float32)
    # Rows of a wide layer can pass 2³¹ elements: the base pointers walk, and offsets inside a tile stay 32 bits wide.
    left = M - split * chunk
    first = split.to(tl.int64) * chunk
    p += first * stride_pm
    if q is not None:
        q += first * stride_qm
    if t is not None:
        t += first * stride_tm
    rows = tl.arange(0, BM)
    for m0 in range(0, chunk, BM):
        row_ok = m0 + rows < left
        ok = row_ok[:, None] & col_ok[None, :]
        p_tile = tl.load(p + (rows[:, None] * stride_pm + units[None, :] * stride_pc), mask=ok, other=0.0)
        p += BM * stride_pm
        if q is not None:
            q_ok = row_ok[:, None] & (ranks < rank)[None, :]
            q_tile = tl.load(q + (rows[:, None] * stride_qm + ranks[None, :]), mask=q_ok, other=0.0)
            q += BM * stride_qm
            outer_acc = _dot(tl.trans(p_tile), q_tile, outer_acc, PRECISION, INTERPRET)
        if t is not None:
            t_ptr = t + (rows[:, None] * stride_tm + units[None, :] * stride_tc)
            t_tile = tl.load(t_ptr, mask=ok & first_ranks, other=0.0)
            t += BM * stride_tm
            dots_acc += p_tile.to(tl.float32) * t_tile.to(tl.float32)
    if q is not None:
        outer_ptr = outer + (split * kept + cols[:, None]) * rank + ranks[None, :]
        tl.store(outer_ptr, outer_acc, mask=col_ok[:, None] & (ranks < rank)[None, :])
    if t is not None:
        tl.store(dots + split * kept + cols, tl.reduce(dots_acc, 0, _add), mask=col_ok & first_ranks)


@triton.jit
def finish_reduce(
    outer, dots, gate, index, d_outer, d_gate, kept, rank, splits, scaling, stride_c, stride_r,
    ADD: tl.constexpr, RANK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients from the sums of `column_reduce`, each unit's at its place: s·gate⊙Σ outer and Σ dots / gate.

    The grid is over units and over RANK ranks each. Strides of d_outer: dB is [N, R], dA is [R, K]; ADD: to what it
    holds. A gate of exactly 0 gets 0. d_outer or d_gate may be None.
    """
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    col_ok = cols < kept
    units = cols
    if index is not None:
        units = tl.load(index + cols, mask=col_ok, other=0).to(tl.int32)
    if gate is not None:
        factor = tl.load(gate + units, mask=col_ok, other=0.0).to(tl.float32)
    if d_outer is not None:
        ranks = tl.program_id(1) * RANK + tl.arange(0, RANK)
        ok = col_ok[:, None] & (ranks < rank)[None, :]
        total = tl.full([BC, RANK], 0.0, tl.float32)
        for split in range(0, splits):
            total += tl.load(outer + (split * kept + cols[:, None]) * rank + ranks[None, :], mask=ok, other=0.0)
        if gate is not None:
            total *= factor[:, None] * scaling
        else:
            total *= scaling
        target = d_outer + (units[:, None] * stride_c + ranks[None, :] * stride_r)
        if ADD:
            total += tl.load(target, mask=ok, other=0.0).to(tl.float32)
        tl.store(target, total.to(d_outer.dtype.element_ty), mask=ok)
    if d_gate is not None:
        dot = tl.full([BC], 0.0, tl.float32)
        for split in range(0, splits):
            dot += tl.load(dots + split * kept + cols, mask=col_ok, other=0.0)
        open_ = factor != 0.0
        dot = tl.where(open_, dot / tl.where(open_, factor, 1.0), 0.0)
        tl.store(d_gate + units, dot.to(d_gate.dtype.element_ty), mask=col_ok & (tl.program_id(1) == 0))
