"""From tensors to kernel launches: strides, padding, index lists, tile sizes.

Letters: M tokens, K inputs (summed), N outputs, R rank; n and k are the kept ones.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nuteprune.kernels import triton_kernels, tuning
from nuteprune.kernels.torch_path import rows
from nuteprune.kernels.tuning import INTERPRETER, INTERPRETING, Config, bucket, choose, configs

FUSED_RANK = 16  # up to here u = xAᵀ rides along in the matmul (1/8 of a 128-wide tile), else it is a launch before it
REDUCE_PROGRAMS = 512  # about four a multiprocessor on the cards aimed at; a constant keeps sums equal across cards


class Operand:
    """One masked LoRA product: x [M, K] or [B, M/B, K] (or the kept columns of it) with rows at equal distances.

    w [N, K], a [R, K] and b [N, R] have any strides; `swapped`: what is there is each one's transpose, and only the
    strides are read the other way round (a view of each would cost more than a small kernel).

    Attributes:
        tokens, outputs, rank: M, N, R (0 without LoRA).
        kept: (n, k).
        w_strides: of w along its outputs and its inputs.
    """

    __slots__ = (
        "a", "b", "bias", "compact_in", "compact_out", "in_gate", "keep_in", "keep_out", "kept", "out_gate", "outputs",
        "rank", "scaling", "swapped", "tokens", "w", "w_strides", "x",
    )  # fmt: skip

    def __init__(
        self, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, in_gate: Tensor | None,
        out_gate: Tensor | None, keep_in: Tensor | None, keep_out: Tensor | None, scaling: float, compact_in: bool,
        compact_out: bool, swapped: bool = False,
    ):  # fmt: skip
        self.x, self.w, self.bias, self.a, self.b = x, w, bias, a, b
        self.in_gate, self.out_gate, self.keep_in, self.keep_out = in_gate, out_gate, keep_in, keep_out
        self.scaling, self.compact_in, self.compact_out, self.swapped = scaling, compact_in, compact_out, swapped
        n, k = w.shape[::-1] if swapped else w.shape
        self.tokens, self.outputs = tokens(x), n
        self.rank = 0 if a is None else a.shape[1 if swapped else 0]
        self.kept = (n if keep_out is None else keep_out.shape[0], k if keep_in is None else keep_in.shape[0])
        self.w_strides = self.strides(w)

    def strides(self, matrix: Tensor) -> tuple[int, ...]:
        """Strides of w, a or b as the product reads it."""
        strides = matrix.stride()
        return strides[::-1] if self.swapped else strides

    def transposed(self, grad: Tensor) -> "Operand":
        """The product that gives dx from `grad` [M, N]: same expression, roles of inputs and outputs swapped."""
        return Operand(grad, self.w, None, self.b, self.a, self.out_gate, self.in_gate, self.keep_out, self.keep_in,
                       self.scaling, self.compact_out, self.compact_in, not self.swapped)  # fmt: skip

    def skinny(self) -> "Operand":
        """u = (x⊙m_in)Aᵀ as a product without LoRA: A in W's place."""
        assert self.a is not None
        return Operand(self.x, self.a, None, None, None, self.in_gate, None, self.keep_in, None, self.scaling,
                       self.compact_in, True, self.swapped)  # fmt: skip


def tokens(x: Tensor) -> int:
    """Rows of a tensor [M, K] or [B, M/B, K]."""
    return x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]


def in_rows(x: Tensor) -> Tensor:
    """x as it is where its rows lie at equal distances, else as [M, K], copied if need be."""
    if x.dim() == 2 or (x.dim() == 3 and x.stride(0) == x.shape[1] * x.stride(1)):
        return x
    return rows(x)


_NO_CARD = nullcontext()


def guard(x: Tensor):
    """Makes x's card current for a launch."""
    return torch.cuda.device(x.device) if x.is_cuda else _NO_CARD


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input precision: fp32 follows torch's TF32 switch, else splits each operand in three (about fp32)."""
    if dtype != torch.float32 or INTERPRETING or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def padded(rank: int) -> int:
    """tl.dot needs powers of two from 16 on."""
    return max(16, 1 << max(rank - 1, 0).bit_length())


_workspaces: dict[tuple, Tensor] = {}


def workspace(x: Tensor, name: str, numel: int, dtype: torch.dtype, shape: tuple[int, int] | None = None) -> Tensor:
    """Memory for what only the launches of one call read: the same again for the next call on the stream of `x`.

    Without `shape` it is flat, and may be longer than asked for.
    """
    device = x.device
    stream = torch.cuda.current_stream(device).cuda_stream if x.is_cuda else 0
    place = (name, device, stream, dtype, shape)
    memory = _workspaces.get(place)
    if memory is None or memory.numel() < numel:
        memory = _workspaces[place] = torch.empty(shape or bucket(numel), dtype=dtype, device=device)
    return memory


def empty_output(op: Operand) -> Tensor:
    """y [M, N] or [B, M/B, N] for a launch, zeroed where units are skipped."""
    lead = op.x.shape[:-1]
    if op.keep_out is not None and not op.compact_out:
        return op.x.new_zeros(*lead, op.outputs)
    return op.x.new_empty(*lead, op.kept[0])


def run_time(op: Operand, u: Tensor | None, y: Tensor) -> tuple:
    """The run-time arguments of one product in `matmul`: pointers (None for what is absent), sizes, strides."""
    lora = (0, 0, 0, 0) if op.a is None or op.b is None else (*op.strides(op.a), *op.strides(op.b))
    pointers = (op.x, op.w, op.bias, op.a, op.b, u, y, op.in_gate, op.out_gate, op.keep_in, op.keep_out)
    sizes = (op.tokens, *op.kept, op.rank, op.scaling)
    return (*pointers, *sizes, *op.x.stride()[-2:], *op.w_strides, *lora, y.stride(-2))


def options(op: Operand, fuse_u: bool, config: Config, add: bool = False) -> dict:
    """The compile-time arguments of one product in `matmul`."""
    return {
        "COMPACT_X": op.compact_in or op.keep_in is None,
        "COMPACT_Y": op.compact_out or op.keep_out is None,
        "GATHER_ROWS": op.keep_in is not None and op.w_strides[1] == 1,
        "FUSE_U": fuse_u,
        "ADD": add,
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
    layout = "n" if op.w_strides[1] == 1 else "t"
    name = str(op.x.dtype).removeprefix("torch.")
    return f"{name} {layout}{absent} m{bucket(op.tokens)} n{bucket(n)} k{bucket(k)} r{padded(op.rank)}"


def matmul_call(
    op: Operand, u: Tensor | None, y: Tensor, fuse_u: bool, config: Config, add: bool = False
) -> tuple[tuple, dict]:
    """(positional, keyword) arguments of `triton_kernels.matmul`; `add`: to what y holds."""
    return run_time(op, u, y), options(op, fuse_u, config, add)


def _launch(op: Operand, u: Tensor | None, y: Tensor, fuse_u: bool, config: Config, add: bool = False) -> None:
    positional, keywords = matmul_call(op, u, y, fuse_u, config, add)
    with guard(op.x):
        triton_kernels.matmul[(programs(op, config),)](*positional, **keywords)


def skinny(op: Operand, u: Tensor) -> Tensor:
    """u = (x⊙m_in)Aᵀ [M, R] in a launch of its own, into `u`."""
    if u.numel():
        _launch(op.skinny(), None, u, False, tuning.skinny(padded(op.rank), op.x.dtype))
    return u


def empty_u(op: Operand, lasting: bool) -> Tensor:
    """Memory for u [M, R], of the call's own or, if it need not last, a workspace."""
    shape = op.tokens, op.rank
    if lasting:
        return op.x.new_empty(shape)
    return workspace(op.x, "u", shape[0] * shape[1], op.x.dtype, shape)


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
    along_k = op.keep_in is not None and op.w_strides[1] == 1
    along_n = op.keep_out is not None and op.w_strides[0] == 1
    return gathers_x or along_k or along_n


def matmul(
    op: Operand, keep_u: bool = True, lasting: bool = True, onto: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(y, u) of one product; u is None without LoRA, and unset where no output is kept (nothing reads it then).

    Args:
        keep_u: u is wanted; without it a matmul that produces u itself keeps it to itself.
        lasting: u is read after the next call too.
        onto: y of another product, to which this one is added.
    """
    fused = fuses_u(op)
    y = empty_output(op) if onto is None else onto
    u = empty_u(op, lasting) if op.rank and (keep_u or not fused) else None
    if u is not None and not fused:
        skinny(op, u)
    if has_tiles(op):
        scratch = (lambda: y) if onto is None else lru_cache(lambda: empty_output(op))  # measuring must not add

        def measured(config: Config) -> None:
            _launch(op, u, scratch(), fused, config)

        _launch(op, u, y, fused, config_of(op, measured), onto is not None)
    return y, u


_chosen: dict[tuple, Config] = {}
"""Configs by everything that `key` rounds: the string is made, and the tuner asked, once for each."""


def config_of(op: Operand, run: Callable[[Config], None]) -> Config:
    """The tile sizes for a product."""
    if INTERPRETING:
        return INTERPRETER
    absent = (op.a is None, op.in_gate is None, op.out_gate is None, op.keep_in is None, op.keep_out is None)
    exact = (op.x.dtype, op.x.device, op.w_strides[1] == 1, absent, op.tokens, op.kept, op.rank)
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
    n = p.shape[-1] if keep is None or compact else keep.shape[0]
    bm, bn, _, stages, warps = tuning.reduction(p.dtype)
    columns = max(1, -(-n // bn))
    splits = max(1, min(-(-m // (4 * bm)), REDUCE_PROGRAMS // columns))
    chunk = -(-m // (splits * bm)) * bm
    outer = None if q is None else workspace(p, "outer", splits * n * rank, torch.float32)
    dots = None if t is None else workspace(p, "dots", splits * n, torch.float32)
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
        sum: that matrix's gradient so far, float32 and of its strides, to which this one is added; None: it is new.
    """

    gate: Tensor | None
    keep: Tensor | None
    outer: Tensor | None
    sum: Tensor | None = None


def column_reduce(
    p: Tensor, q: Tensor | None, t: Tensor | None, compact: bool, side: Small, scaling: float, across: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(s·gate⊙pᵀq, Σ_m p⊙t / gate) over the kept columns of p and t, zeros at the others; in the types of `side`.

    t holds gate·v (or p does), so dividing leaves ∂L/∂gate; exact zeros get 0. The first is None where it was added to
    `side.sum`.

    Args:
        p, t: [M, n]; t is None where no gate's gradient is wanted.
        q: [M, R], None where no LoRA gradient is wanted.
        across: the LoRA matrix is [R, units].
    """
    grid, positional, keywords = reduce_call(p, q, t, side.keep, compact)
    outer, dots, n, rank = *positional[3:5], *positional[7:9]
    runs = n and tokens(p)
    make = torch.empty_like if side.keep is None and runs else torch.zeros_like
    add = q is not None and side.sum is not None
    target = side.sum if add else None if q is None else make(side.outer, memory_format=torch.contiguous_format)
    d_gate = None if t is None else make(side.gate, memory_format=torch.contiguous_format)
    if runs:
        strides = (0, 0) if target is None else target.stride()[::-1] if across else target.stride()
        call = (outer, dots, side.gate, side.keep, target, d_gate, n, rank, grid[1], scaling, *strides)
        with guard(p):
            triton_kernels.column_reduce[grid](*positional, **keywords)
            triton_kernels.finish_reduce[(grid[0],)](*call, ADD=add, RANK=keywords["RANK"], BC=keywords["BC"])
    return None if add else target, d_gate
