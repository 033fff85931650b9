"""From tensors to kernel launches: strides, padding, index lists, tile sizes.

Letters: M tokens, K inputs (summed), N outputs, R rank; n and k are the kept ones.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nuteprune.kernels import triton_kernels, tuning
from nuteprune.kernels.torch_path import rows
from nuteprune.kernels.tuning import INTERPRETER, INTERPRETING, Config, bucket, choose, configs

FUSED_RANK = 16  # up to here u = xAᵀ rides along in the matmul (1/8 of a 128-wide tile), else it is a launch before it
REDUCE_PROGRAMS = 512  # about four a multiprocessor on the cards aimed at; a constant keeps sums equal across cards


class Operand(NamedTuple):
    """One masked LoRA product: x [M, K] or [B, M/B, K] (or the kept columns of it) with rows at equal distances.

    w [N, K], a [R, K] and b [N, R] have any strides.
    """

    x: Tensor
    w: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    in_gate: Tensor | None
    out_gate: Tensor | None
    keep_in: Tensor | None
    keep_out: Tensor | None
    scaling: float
    compact_in: bool
    compact_out: bool

    @property
    def kept(self) -> tuple[int, int]:
        """(n, k)"""
        n, k = self.w.shape
        return n if self.keep_out is None else len(self.keep_out), k if self.keep_in is None else len(self.keep_in)

    @property
    def tokens(self) -> int:
        """M"""
        return tokens(self.x)

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    def transposed(self, grad: Tensor) -> "Operand":
        """The product that gives dx from `grad` [M, N]: same expression, roles of inputs and outputs swapped."""
        a, b = (None, None) if self.a is None or self.b is None else (self.b.t(), self.a.t())
        gates, keeps = (self.out_gate, self.in_gate), (self.keep_out, self.keep_in)
        return Operand(grad, self.w.t(), None, a, b, *gates, *keeps, self.scaling, self.compact_out, self.compact_in)


def tokens(x: Tensor) -> int:
    """Rows of a tensor [M, K] or [B, M/B, K]."""
    return x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]


def in_rows(x: Tensor) -> Tensor:
    """x as it is where its rows lie at equal distances, else as [M, K], copied if need be."""
    if x.dim() == 2 or (x.dim() == 3 and x.stride(0) == x.shape[1] * x.stride(1)):
        return x
    return rows(x)


def guard(x: Tensor):
    """Makes x's card current for a launch."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input precision: fp32 follows torch's TF32 switch, else splits each operand in three (about fp32)."""
    if dtype != torch.float32 or INTERPRETING or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def padded(rank: int) -> int:
    """tl.dot needs powers of two from 16 on."""
    return max(16, 1 << max(rank - 1, 0).bit_length())


def empty_outputs(op: Operand, keep_u: bool = True) -> tuple[Tensor, Tensor | None]:
    """(y, u) for a launch: y [M, N] or [B, M/B, N], zeroed where units are skipped; u [M, R], None without LoRA."""
    lead = op.x.shape[:-1]
    if op.keep_out is not None and not op.compact_out:
        y = op.x.new_zeros(*lead, op.w.shape[0])
    else:
        y = op.x.new_empty(*lead, op.kept[0])
    return y, op.x.new_empty(op.tokens, op.rank) if op.rank and keep_u else None


def run_time(op: Operand, u: Tensor | None, y: Tensor) -> tuple:
    """The run-time arguments of one product in `matmul`: pointers (None for what is absent), sizes, strides."""
    lora = (0, 0, 0, 0) if op.a is None or op.b is None else (*op.a.stride(), *op.b.stride())
    pointers = (op.x, op.w, op.bias, op.a, op.b, u, y, op.in_gate, op.out_gate, op.keep_in, op.keep_out)
    sizes = (op.tokens, *op.kept, op.rank, op.scaling)
    return (*pointers, *sizes, *op.x.stride()[-2:], *op.w.stride(), *lora, y.stride(-2))


def options(op: Operand, fuse_u: bool, config: Config) -> dict:
    """The compile-time arguments of one product in `matmul`."""
    return {
        "COMPACT_X": op.compact_in or op.keep_in is None,
        "COMPACT_Y": op.compact_out or op.keep_out is None,
        "GATHER_ROWS": op.keep_in is not None and op.w.stride(1) == 1,
        "FUSE_U": fuse_u,
        "EVEN_K": op.kept[1] % config.bk == 0,
        "RANK": FUSED_RANK,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "INTERPRET": INTERPRETING,
        "PRECISION": precision(op.x.dtype),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def programs(op: Operand, config: Config) -> int:
    return -(-op.tokens // config.bm) * -(-op.kept[0] // config.bn)


def key(op: Operand) -> str:
    """What a tuned config is remembered under: everything that changes the generated code or the number of tiles."""
    n, k = op.kept
    absent = "".join("-" if t is None else "+" for t in (op.a, op.in_gate, op.out_gate, op.keep_in, op.keep_out))
    layout = "n" if op.w.stride(-1) == 1 else "t"
    name = str(op.x.dtype).removeprefix("torch.")
    return f"{name} {layout}{absent} m{bucket(op.tokens)} n{bucket(n)} k{bucket(k)} r{padded(op.rank)}"


def matmul_call(op: Operand, u: Tensor | None, y: Tensor, fuse_u: bool, config: Config) -> tuple[tuple, dict]:
    """(positional, keyword) arguments of `triton_kernels.matmul`."""
    return run_time(op, u, y), options(op, fuse_u, config)


def _launch(op: Operand, u: Tensor | None, y: Tensor, fuse_u: bool, config: Config) -> None:
    positional, keywords = matmul_call(op, u, y, fuse_u, config)
    with guard(op.x):
        triton_kernels.matmul[(programs(op, config),)](*positional, **keywords)


def skinny_operand(op: Operand) -> Operand:
    """u = (x⊙m_in)Aᵀ as a product without LoRA: A in W's place."""
    return op._replace(w=op.a, bias=None, a=None, b=None, out_gate=None, keep_out=None, compact_out=True)


def skinny(op: Operand) -> Tensor:
    """u = (x⊙m_in)Aᵀ [M, R] in a launch of its own."""
    u = op.x.new_empty(op.tokens, op.rank)
    if u.numel():
        _launch(skinny_operand(op), None, u, False, tuning.skinny(padded(op.rank), op.x.dtype))
    return u


def fuses_u(op: Operand) -> bool:
    """Whether the matmul itself produces u."""
    return 0 < op.rank <= FUSED_RANK


def has_tiles(op: Operand) -> bool:
    return op.tokens > 0 and op.kept[0] > 0


def scattered(op: Operand) -> bool:
    """Whether an index list runs along the contiguous dimension of x or W, whose tiles then hold an offset per element.

    A list of whole rows is loaded in vectors as without one.
    """
    gathers_x = op.keep_in is not None and not op.compact_in
    along_k = op.keep_in is not None and op.w.stride(1) == 1
    along_n = op.keep_out is not None and op.w.stride(0) == 1
    return gathers_x or along_k or along_n


def matmul(op: Operand, keep_u: bool = True) -> tuple[Tensor, Tensor | None]:
    """(y, u) of one product; u is None without LoRA, and unset where no output is kept (nothing reads it then).

    Args:
        keep_u: u is wanted; without it a matmul that produces u itself keeps it to itself.
    """
    fused = fuses_u(op)
    y, u = empty_outputs(op, keep_u and fused)
    if op.rank and not fused:
        u = skinny(op)
    if has_tiles(op):

        def run(config: Config) -> None:
            _launch(op, u, y, fused, config)

        run(config_of(op, run))
    return y, u


_chosen: dict[tuple, Config] = {}
"""Configs by everything that `key` rounds: the string is made, and the tuner asked, once for each."""


def config_of(op: Operand, run: Callable[[Config], None]) -> Config:
    """The tile sizes for a product."""
    if INTERPRETING:
        return INTERPRETER
    absent = (op.a is None, op.in_gate is None, op.out_gate is None, op.keep_in is None, op.keep_out is None)
    exact = (op.x.dtype, op.x.device, op.w.stride(-1) == 1, absent, op.tokens, op.kept, op.rank)
    config = _chosen.get(exact)
    if config is None:
        choices = configs(op.x.dtype, scattered(op), op.x.device)
        config = choose(key(op), choices, op.x.device, run)
        if not torch.cuda.is_current_stream_capturing():  # then nothing was measured
            _chosen[exact] = config
    return config


def reduce_call(
    p: Tensor, q: Tensor | None, t: Tensor | None, keep: Tensor | None, compact: bool
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, positional, keyword arguments) of `triton_kernels.column_reduce`; positions 3 and 4 are its outputs."""
    m, rank = tokens(p), 0 if q is None else q.shape[1]
    n = p.shape[-1] if keep is None or compact else len(keep)
    bm, bn, _, stages, warps = tuning.reduction(p.dtype)
    columns = max(1, -(-n // bn))
    splits = max(1, min(-(-m // (4 * bm)), REDUCE_PROGRAMS // columns))
    chunk = -(-m // (splits * bm)) * bm
    outer = None if q is None else p.new_empty(splits, n, rank, dtype=torch.float32)
    dots = None if t is None else p.new_empty(splits, n, dtype=torch.float32)
    strides = (*p.stride()[-2:], *(t.stride()[-2:] if t is not None else (0, 0)))
    keywords: dict[str, Any] = {"COMPACT": compact or keep is None, "RANK": padded(rank), "BM": bm, "BC": bn}
    keywords |= {"PRECISION": precision(p.dtype), "INTERPRET": INTERPRETING}
    keywords |= {"num_warps": warps, "num_stages": stages}
    return (columns, splits), (p, q, t, outer, dots, keep, m, n, rank, chunk, *strides), keywords


class Small(NamedTuple):
    """One side of a product, as far as its small gradients go.

    Attributes:
        gate, keep: the side's gate and kept units.
        outer: the LoRA matrix of this side, [units, R] or its transpose; None without LoRA.
    """

    gate: Tensor | None
    keep: Tensor | None
    outer: Tensor | None


def column_reduce(
    p: Tensor, q: Tensor | None, t: Tensor | None, compact: bool, side: Small, scaling: float, across: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(s·gate⊙pᵀq, Σ_m p⊙t / gate) over the kept columns of p and t, zeros at the others; in the types of `side`.

    t holds gate·v (or p does), so dividing leaves ∂L/∂gate; exact zeros get 0.

    Args:
        p, t: [M, n]; t is None where no gate's gradient is wanted.
        q: [M, R], None where no LoRA gradient is wanted.
        across: the LoRA matrix is [R, units].
    """
    some = side.keep is not None
    grid, positional, keywords = reduce_call(p, q, t, side.keep, compact)
    outer, dots, n, rank = *positional[3:5], *positional[7:9]
    runs = n and tokens(p)
    make = torch.zeros_like if some or not runs else torch.empty_like
    d_outer = None if q is None else make(side.outer, memory_format=torch.contiguous_format)
    d_gate = None if t is None else make(side.gate, memory_format=torch.contiguous_format)
    if runs:
        strides = (0, 0) if d_outer is None else d_outer.stride()[::-1] if across else d_outer.stride()
        call = (outer, dots, side.gate, side.keep, d_outer, d_gate, n, rank, grid[1], scaling, *strides)
        with guard(p):
            triton_kernels.column_reduce[grid](*positional, **keywords)
            triton_kernels.finish_reduce[(grid[0],)](*call, RANK=keywords["RANK"], BC=keywords["BC"])
    return d_outer, d_gate
