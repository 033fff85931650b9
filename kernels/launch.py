"""From tensors to kernel launches: strides, padding, index lists, tile sizes.

Letters: M tokens, K inputs (summed), N outputs, R rank; n and k are the kept ones.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nuteprune.kernels import triton_kernels, tuning
from nuteprune.kernels.product import Product, Side
from nuteprune.kernels.torch_path import rows
from nuteprune.kernels.tuning import INTERPRETER, INTERPRETING, TileConfig, bucket, choose, configs

FUSED_RANK = 16  # up to here u = xAᵀ rides along in the matmul (1/8 of a 128-wide tile), else it is a launch before it
REDUCE_PROGRAMS = 512  # about four a multiprocessor on the cards aimed at; a constant keeps sums equal across cards
REDUCED_RANKS = 64  # of one program: with more, their sums spill registers


def tokens(x: Tensor) -> int:
    """Rows of a tensor [M, K] or [B, M/B, K]."""
    return x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]


def in_rows(x: Tensor) -> Tensor:
    """x as it is where its rows lie at equal distances, else as [M, K], copied if need be."""
    dim = x.dim()
    if dim == 2 or (dim == 3 and x.stride(0) == x.shape[1] * x.stride(1)):
        return x
    return rows(x)


def start(kernel: Any, grid: tuple[int, ...], x: Tensor, positional: tuple, keywords: dict) -> None:
    """Launch a kernel on x's card."""
    if x.is_cuda and torch.cuda.current_device() != x.get_device():
        with torch.cuda.device(x.device):
            kernel[grid](*positional, **keywords)
    else:
        kernel[grid](*positional, **keywords)


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


def skips(product: Product) -> bool:
    """Whether y has columns that no program writes."""
    return product.keep_out is not None and not product.compact_out


def empty_output(product: Product, x: Tensor) -> Tensor:
    """y [M, N] or [B, M/B, N] for a launch, zeroed where units are skipped."""
    if skips(product):
        return x.new_zeros(*x.shape[:-1], product.outputs)
    return x.new_empty(*x.shape[:-1], product.kept[0])


def empty_u(product: Product, x: Tensor, lasting: bool) -> Tensor:
    """Memory for u [M, R], of the call's own or, if it need not last, a workspace."""
    shape = tokens(x), product.rank
    if lasting:
        return x.new_empty(*shape)
    return workspace(x, "u", shape[0] * shape[1], x.dtype, shape)


def options(product: Product, dtype: torch.dtype, fuse_u: bool, config: TileConfig, add: bool = False) -> dict:
    """The compile-time arguments of one product in `matmul`."""
    return {
        "COMPACT_X": product.compact_in or product.keep_in is None,
        "COMPACT_Y": product.compact_out or product.keep_out is None,
        "GATHER_ROWS": product.keep_in is not None and product.w_strides[1] == 1,
        "FUSE_U": fuse_u,
        "ADD": add,
        "EVEN_K": product.kept[1] % config.bk == 0,
        "RANK": FUSED_RANK,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "INTERPRET": INTERPRETING,
        "PRECISION": precision(dtype),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def key(product: Product, x: Tensor) -> str:
    """What a tuned config is remembered under: everything that changes the generated code or the number of tiles."""
    n, k = product.kept
    absent = "".join("-" if t is None else "+" for t in (product.a, *product.after))
    layout = "n" if product.w_strides[1] == 1 else "t"
    name = str(x.dtype).removeprefix("torch.")
    return f"{name} {layout}{absent} m{bucket(tokens(x))} n{bucket(n)} k{bucket(k)} r{padded(product.rank)}"


class Tiles:
    """A launch of `triton_kernels.matmul` but for its tensors; `add`: to what y holds.

    Attributes:
        grid: its programs.
        sizes: the run-time arguments behind the pointers.
        options: the compile-time arguments.
    """

    __slots__ = ("grid", "options", "shape", "sizes", "zeroed")

    def __init__(self, product: Product, x: Tensor, y: Tensor, fuse_u: bool, config: TileConfig, add: bool = False):
        count = tokens(x)
        sizes = (count, *product.kept, product.rank, product.scaling)
        self.sizes = (*sizes, *x.stride()[-2:], *product.strides, y.stride(-2))
        self.grid = (-(-count // config.bm) * -(-product.kept[0] // config.bn),)
        self.options = options(product, x.dtype, fuse_u, config, add)
        self.shape, self.zeroed = tuple(y.shape), skips(product)

    def output(self, x: Tensor) -> Tensor:
        """y, see `empty_output`."""
        return x.new_zeros(*self.shape) if self.zeroed else x.new_empty(*self.shape)

    def arguments(self, product: Product, x: Tensor, u: Tensor | None, y: Tensor) -> tuple:
        """The run-time arguments: pointers (None for what is absent), sizes, strides."""
        return (x, *product.before, u, y, *product.after, *self.sizes)

    def start(self, product: Product, x: Tensor, u: Tensor | None, y: Tensor) -> None:
        """Launch it."""
        start(triton_kernels.matmul, self.grid, x, self.arguments(product, x, u, y), self.options)


def skinny(product: Product, x: Tensor, u: Tensor) -> Tensor:
    """u = (x⊙m_in)Aᵀ [M, R] in a launch of its own, into `u`."""
    if u.numel():
        alone, place = product.skinny, (x.shape, x.stride(), x.dtype)
        tiles = alone.plans.get(place)
        if tiles is None:
            config = tuning.skinny(padded(product.rank), x.dtype)
            tiles = Tiles(alone, x, u, False, config)
            alone.remember(place, tiles)
        tiles.start(alone, x, None, u)
    return u


def fuses_u(product: Product) -> bool:
    """Whether the matmul itself produces u."""
    return 0 < product.rank <= FUSED_RANK


def matmul(
    product: Product, x: Tensor, keep_u: bool = True, lasting: bool = True, onto: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(y, u) of one product; u is None without LoRA, and unset where no output is kept (nothing reads it then).

    Args:
        x: [M, K] or [B, M/B, K] (or the kept columns of it) with rows at equal distances.
        keep_u: u is wanted; without it a matmul that produces u itself keeps it to itself.
        lasting: u is read after the next call too.
        onto: y of another product, to which this one is added.
    """
    fuse_u, add = fuses_u(product), onto is not None
    place = (x.shape, x.stride(), x.dtype, add)
    tiles = product.plans.get(place)
    y = onto if onto is not None else empty_output(product, x) if tiles is None else tiles.output(x)
    u = empty_u(product, x, lasting) if product.rank and (keep_u or not fuse_u) else None
    if u is not None and not fuse_u:
        skinny(product, x, u)
    if tiles is None:
        tiles = _tiles(product, x, u, y, fuse_u, add)
        if not capturing(x):  # then no sizes were measured
            product.remember(place, tiles)
    if tiles.grid[0]:
        tiles.start(product, x, u, y)
    return y, u


def _tiles(product: Product, x: Tensor, u: Tensor | None, y: Tensor, fuse_u: bool, add: bool) -> Tiles:
    """The launch of a product in the tile sizes chosen for it."""
    scratch = lru_cache(lambda: empty_output(product, x)) if add else (lambda: y)  # measuring must not add

    def measured(config: TileConfig) -> None:
        Tiles(product, x, scratch(), fuse_u, config).start(product, x, u, scratch())

    runs = product.kept[0] and tokens(x)
    return Tiles(product, x, y, fuse_u, config_of(product, x, measured) if runs else INTERPRETER, add)


def capturing(x: Tensor) -> bool:
    """Whether launches on x's card are being captured in a graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


_chosen: dict[tuple, TileConfig] = {}
"""Configs by everything that `key` rounds: the string is made, and the tuner asked, once for each."""


def config_of(product: Product, x: Tensor, run: Callable[[TileConfig], None]) -> TileConfig:
    """The tile sizes for a product."""
    if INTERPRETING:
        return INTERPRETER
    absent = tuple(t is None for t in (product.a, *product.after))
    exact = (x.dtype, x.device, product.w_strides[1] == 1, absent, tokens(x), product.kept, product.rank)
    config = _chosen.get(exact)
    if config is None:
        choices = configs(x.dtype, product.scattered, x.device)
        config = choose(key(product, x), choices, x.device, run)
        if not capturing(x):  # then nothing was measured
            _chosen[exact] = config
    return config


@lru_cache(4096)
def _reduce_sizes(
    shape: tuple[int, ...], strides: tuple[int, ...], strides_t: tuple[int, ...], stride_q: int, dtype: torch.dtype,
    n: int, rank: int, compact: bool, kind: str,
) -> tuple[tuple[int, int, int], tuple, dict]:  # fmt: skip
    """Grid, sizes and compile-time arguments of `triton_kernels.column_reduce`; `kind`: tl.dot's precision."""
    m = shape[0] if len(shape) == 2 else shape[0] * shape[1]
    bm, bn, _, stages, warps = tuning.reduction(dtype)
    columns = max(1, -(-n // bn))
    splits = max(1, min(-(-m // (4 * bm)), REDUCE_PROGRAMS // columns))
    chunk = -(-m // (splits * bm)) * bm
    ranks = min(padded(rank), REDUCED_RANKS)
    keywords: dict[str, Any] = {"COMPACT": compact, "RANK": ranks, "BM": bm, "BC": bn}
    keywords |= {"PRECISION": kind, "INTERPRET": INTERPRETING, "num_warps": warps, "num_stages": stages}
    return (
        (columns, splits, max(1, -(-rank // ranks))),
        (m, n, rank, chunk, *strides[-2:], *strides_t, stride_q),
        keywords,
    )


def reduce_call(
    p: Tensor, q: Tensor | None, t: Tensor | None, keep: Tensor | None, compact: bool
) -> tuple[tuple[int, int, int], tuple, dict]:
    """(grid, positional, keyword arguments) of `triton_kernels.column_reduce`; positions 3 and 4 are its outputs."""
    rank, stride_q = (0, 0) if q is None else (q.shape[1], q.stride(0))
    n = p.shape[-1] if keep is None or compact else keep.shape[0]
    strides_t = (0, 0) if t is None else t.stride()[-2:]
    compact = compact or keep is None
    laid_out = p.shape, p.stride(), strides_t, stride_q
    grid, sizes, keywords = _reduce_sizes(*laid_out, p.dtype, n, rank, compact, precision(p.dtype))
    outer = None if q is None else workspace(p, "outer", grid[1] * n * rank, torch.float32)
    dots = None if t is None else workspace(p, "dots", grid[1] * n, torch.float32)
    return grid, (p, q, t, outer, dots, keep, *sizes), keywords


@lru_cache(64)
def _finish_options(add: bool, rank: int, columns: int) -> dict:
    return {"ADD": add, "RANK": rank, "BC": columns}


def column_reduce(
    p: Tensor, q: Tensor | None, t: Tensor | None, compact: bool, side: Side, scaling: float, across: bool,
    onto: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(s·gate⊙pᵀq, Σ_m p⊙t / gate) over the kept columns of p and t, zeros at the others; in the types of `side`.

    t holds gate·v (or p does), so dividing leaves ∂L/∂gate; exact zeros get 0. The first is None where it was added to
    `onto`.

    Args:
        p, t: [M, n]; t is None where no gate's gradient is wanted.
        q: [M, R], None where no LoRA gradient is wanted.
        across: the LoRA matrix is [R, units].
        onto: the LoRA matrix's gradient so far, float32 and of its strides, to which this one is added.
    """
    grid, positional, keywords = reduce_call(p, q, t, side.keep, compact)
    outer, dots, n, rank = *positional[3:5], *positional[7:9]
    runs = n and p.numel()
    make = torch.empty_like if side.keep is None and runs else torch.zeros_like
    add = q is not None and onto is not None
    target = onto if add else None if q is None else make(side.outer, memory_format=torch.contiguous_format)
    d_gate = None if t is None else make(side.gate, memory_format=torch.contiguous_format)
    if runs:
        strides = (0, 0) if target is None else target.stride()[::-1] if across else target.stride()
        call = (outer, dots, side.gate, side.keep, target, d_gate, n, rank, grid[1], scaling, *strides)
        start(triton_kernels.column_reduce, grid, p, positional, keywords)
        last = _finish_options(add, keywords["RANK"], keywords["BC"])
        start(triton_kernels.finish_reduce, grid[::2], p, call, last)
    return None if add else target, d_gate
