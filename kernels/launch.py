"""From tensors to kernel launches: strides, padding, index lists, tile sizes.

Letters: M tokens, K inputs (summed), N outputs, R rank; n and k are the kept ones.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from nuteprune.kernels import triton_kernels, tuning
from nuteprune.kernels.tuning import INTERPRETING, Config, bucket, choose, configs

FUSED_RANK = 16  # up to here u = xAᵀ rides along in the matmul (1/8 of a 128-wide tile), else it is a launch before it
REDUCE_PROGRAMS = 512  # about four a multiprocessor on the cards aimed at; a constant keeps sums equal across cards


class Operand(NamedTuple):
    """One masked LoRA product: x [M, K] (or the kept columns of it), w [N, K], a [R, K], b [N, R], any strides."""

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
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    def transposed(self, grad: Tensor) -> "Operand":
        """The product that gives dx from `grad` [M, N]: same expression, roles of inputs and outputs swapped."""
        a, b = (None, None) if self.a is None else (self.b.t(), self.a.t())
        gates, keeps = (self.out_gate, self.in_gate), (self.keep_out, self.keep_in)
        return Operand(grad, self.w.t(), None, a, b, *gates, *keeps, self.scaling, self.compact_out, self.compact_in)


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


def empty_outputs(op: Operand) -> tuple[Tensor, Tensor]:
    """(y, u) for a launch: y [M, N] zeroed where units are skipped, u [M, R]."""
    n, m = op.w.shape[0], op.x.shape[0]
    if op.keep_out is not None and not op.compact_out:
        y = op.x.new_zeros(m, n)
    else:
        y = op.x.new_empty(m, op.kept[0])
    return y, op.x.new_empty(m, op.rank)


def run_time(op: Operand, u: Tensor | None, y: Tensor) -> tuple:
    """The run-time arguments of one product in `matmul`: pointers (None for what is absent), sizes, strides."""
    lora = (0, 0, 0, 0) if op.a is None else (*op.a.stride(), *op.b.stride())
    pointers = (op.x, op.w, op.bias, op.a, op.b, u, y, op.in_gate, op.out_gate, op.keep_in, op.keep_out)
    sizes = (op.x.shape[0], *op.kept, op.rank, op.scaling)
    return (*pointers, *sizes, *op.x.stride(), *op.w.stride(), *lora, y.stride(0))


def options(op: Operand, fuse_u: bool, config: Config) -> dict:
    """The compile-time arguments of one product in `matmul`."""
    return {
        "COMPACT_X": op.compact_in or op.keep_in is None,
        "COMPACT_Y": op.compact_out or op.keep_out is None,
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
    return -(-op.x.shape[0] // config.bm) * -(-op.kept[0] // config.bn)


def key(op: Operand) -> str:
    """What a tuned config is remembered under: everything that changes the generated code or the number of tiles."""
    n, k = op.kept
    absent = "".join("-" if t is None else "+" for t in (op.a, op.in_gate, op.out_gate, op.keep_in, op.keep_out))
    layout = "n" if op.w.stride(-1) == 1 else "t"
    name = str(op.x.dtype).removeprefix("torch.")
    return f"{name} {layout}{absent} m{bucket(op.x.shape[0])} n{bucket(n)} k{bucket(k)} r{padded(op.rank)}"


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
    u = op.x.new_empty(op.x.shape[0], op.rank)
    if u.numel():
        _launch(skinny_operand(op), None, u, False, tuning.skinny(padded(op.rank), op.x.dtype))
    return u


def fuses_u(op: Operand) -> bool:
    """Whether the matmul itself produces u."""
    return 0 < op.rank <= FUSED_RANK


def has_tiles(op: Operand) -> bool:
    return op.x.shape[0] > 0 and op.kept[0] > 0


def scattered(op: Operand) -> bool:
    """Whether an index list runs along W's contiguous dimension, so that its tiles are gathered element by element."""
    return op.keep_in is not None or (op.keep_out is not None and op.w.stride(1) != 1)


def prepare(op: Operand) -> tuple[Tensor, Tensor]:
    """(y, u) for a launch, u computed already where the matmul will not do it."""
    y, u = empty_outputs(op)
    return y, skinny(op) if op.rank and not fuses_u(op) else u


def matmul(op: Operand) -> tuple[Tensor, Tensor]:
    """(y, u) of one product; u is [M, 0] without LoRA, and unset where no output is kept (nothing reads it then)."""
    y, u = prepare(op)
    if has_tiles(op):

        def run(config: Config) -> None:
            _launch(op, u if op.rank else None, y, fuses_u(op), config)

        choices = configs(op.x.dtype, scattered(op), op.x.device)
        run(choose(key(op), choices, op.x.device, run))
    return y, u


def reduce_call(
    p: Tensor, q: Tensor | None, t: Tensor | None, keep: Tensor | None, compact: bool
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, positional, keyword arguments) of `triton_kernels.column_reduce`; positions 3 and 4 are its outputs."""
    m, rank = p.shape[0], 0 if q is None else q.shape[1]
    n = p.shape[1] if keep is None or compact else len(keep)
    bm, bn, _, stages, warps = tuning.reduction(p.dtype)
    columns = max(1, -(-n // bn))
    splits = max(1, min(-(-m // (4 * bm)), REDUCE_PROGRAMS // columns))
    chunk = -(-m // (splits * bm)) * bm
    outer = p.new_empty(splits, n, rank, dtype=torch.float32)
    dots = p.new_empty(splits, n if t is not None else 0, dtype=torch.float32)
    strides = (*p.stride(), *(t.stride() if t is not None else (0, 0)))
    keywords = {"COMPACT": compact or keep is None, "RANK": padded(rank), "BM": bm, "BC": bn}
    keywords |= {"PRECISION": precision(p.dtype), "INTERPRET": INTERPRETING}
    keywords |= {"num_warps": warps, "num_stages": stages}
    return (columns, splits), (p, q, t, outer, dots, keep, m, n, rank, chunk, *strides), keywords


def column_reduce(
    p: Tensor, q: Tensor | None, t: Tensor | None, keep: Tensor | None, compact: bool
) -> tuple[Tensor, Tensor]:
    """(pᵀq [n, R], Σ_m p⊙t [n]) in fp32 over the kept columns of p and t; of size 0 where q or t is None."""
    grid, positional, keywords = reduce_call(p, q, t, keep, compact)
    outer, dots = positional[3:5]
    if outer.shape[1] and p.shape[0]:
        with guard(p):
            triton_kernels.column_reduce[grid](*positional, **keywords)
    else:
        outer.zero_()
        dots.zero_()
    return outer.sum(0), dots.sum(0)
