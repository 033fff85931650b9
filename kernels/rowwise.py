"""RMSNorm and rotary positions as one kernel each way, with their autograd functions.

For a GPU, where eager torch's many small operations on them cost the host more than the card. The specification is in
`reference.py`; `applies` says where they can run.
"""

from functools import lru_cache

import torch
from torch import Tensor

from nuteprune.kernels import pointwise
from nuteprune.kernels.launch import start
from nuteprune.kernels.masked_lora import apply
from nuteprune.kernels.tuning import INTERPRETING

_TILE = 2048
"""Elements of the tile of a program that takes several rows."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def applies(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors: of one type that they know, on a device of theirs."""
    first = tensors[0]
    dtype, device = first.dtype, first.device
    for other in tensors[1:]:
        if other.dtype != dtype or other.device != device:
            return False
    return dtype in _DTYPES and (first.is_cuda or INTERPRETING)


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x with rows at equal distances and that distance; copied if it has none."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.stride(-1) == 1 and (x.dim() == 2 or (x.dim() == 3 and x.stride(0) == x.shape[1] * x.stride(1))):
        return x, x.stride(-2)
    return x.contiguous(), x.shape[-1]


@lru_cache
def row_tiles(count: int, width: int, **flags: bool) -> tuple[tuple[int], dict]:
    """(grid, keyword arguments) of a kernel over `count` rows of `width`, with flags of its own."""
    block = 1 << max(width - 1, 0).bit_length()
    height = max(1, min(64, _TILE // block))
    warps = 4 if block * height <= _TILE else 8 if block <= 4 * _TILE else 16
    return (-(-count // height),), {**flags, "ROWS": height, "BLOCK": block, "num_warps": warps}


class RmsNorm(torch.autograd.Function):
    """y = (w + offset)⊙x̂ with x̂ = x / sqrt(mean(x²) + eps); dx = (g̃ − x̂·mean(g̃⊙x̂)) / sqrt(…), g̃ = (w + offset)⊙g.

    Arguments: x [..., D], w [D] (frozen), eps, offset, whether x̂ is rounded to x's type before the product.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: float, rounds: bool) -> Tensor:
        source, stride = as_rows(x)
        y = source.new_empty(*x.shape)
        width, size = x.shape[-1], y.numel()
        if size:
            count = size // width
            grid, tiles = row_tiles(count, width, ROUND=rounds)
            start(pointwise.rms_norm, grid, x, (source, weight, y, count, width, eps, offset, stride), tiles)
        if ctx is not None and ctx.needs_input_grad[0]:
            ctx.save_for_backward(source, weight)
            ctx.options = (eps, offset)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        (x, stride), (grad, stride_g) = as_rows(x), as_rows(grad)
        dx = x.new_empty(*x.shape)
        width, size = x.shape[-1], dx.numel()
        if size:
            count = size // width
            grid, tiles = row_tiles(count, width)
            call = (grad, x, weight, dx, count, width, *ctx.options, stride_g, stride)
            start(pointwise.rms_norm_backward, grid, x, call, tiles)
        return dx, None, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds: bool = True) -> Tensor:
    """RMSNorm of x [..., D] with a frozen weight [D], see `RmsNorm`."""
    needs = torch.is_grad_enabled() and x.requires_grad
    if needs:
        return apply(RmsNorm, x, weight, eps, offset, rounds)
    return RmsNorm.forward(None, x, weight, eps, offset, rounds)


class Rotary(torch.autograd.Function):
    """Queries and keys turned by their positions: x·cos + rotate_half(x)·sin, and its transpose for the gradients.

    Arguments: q [B, H, T, P], k [B, K, T, P], cos and sin [B or 1, T, P].
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if ctx is not None:
            ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin, transposed=False)

    @staticmethod
    def backward(ctx, grad_q: Tensor, grad_k: Tensor):
        cos, sin = ctx.saved_tensors
        return *_turn(grad_q, grad_k, cos, sin, transposed=True), None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with rotary positions, see `Rotary`."""
    needs = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return apply(Rotary, q, k, cos, sin) if needs else Rotary.forward(None, q, k, cos, sin)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    if not q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1:
        q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    turned, turned_k = torch.empty_like(q), torch.empty_like(k)
    layout = (q.stride(), k.stride(), turned.stride(), turned_k.stride())
    grid, sizes, options = _turn_sizes(q.shape, k.shape[1], cos.shape[0], cos.stride(), transposed, layout)
    if grid[1] * sizes[0] * grid[2]:
        start(pointwise.rotary, grid, q, (q, k, cos, sin, turned, turned_k, *sizes), options)
    return turned, turned_k


@lru_cache(1024)
def _turn_sizes(
    shape: tuple[int, ...], others: int, angles: int, angle_strides: tuple[int, ...], transposed: bool,
    strides: tuple[tuple[int, ...], ...],
) -> tuple[tuple[int, int, int], tuple, dict]:  # fmt: skip
    """Grid, run-time arguments behind the pointers and compile-time arguments of `pointwise.rotary`."""
    batch, heads, length, width = shape
    half = 1 << max(width // 2 - 1, 0).bit_length()
    height = max(1, min(64, _TILE // half))
    sizes = (length, heads, *[s for four in strides for s in four[:3]])
    sizes += (angle_strides[0] if angles > 1 else 0, angle_strides[1])
    options = {"P": width, "HALF": half, "TRANSPOSED": transposed, "ROWS": height}
    return (-(-length // height), heads + others, batch), sizes, options
