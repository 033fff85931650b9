"""The public call: the search for removed units, the choice of a backend."""

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nuteprune.kernels import torch_path

if TYPE_CHECKING:
    from nuteprune.kernels.product import Product

BACKENDS = ("torch", "triton")
ENV = "NUTEPRUNE_KERNELS"


def masked_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    in_gate: Tensor | None = None,
    out_gate: Tensor | None = None,
    backend: str | None = None,
    *,
    keep_in: Tensor | None = None,
    keep_out: Tensor | None = None,
    compact_in: bool = False,
    compact_out: bool = False,
) -> Tensor:
    """y = ((x⊙m_in)Wᵀ + s((x⊙m_in)Aᵀ)Bᵀ + b)⊙m_out, skipping the units whose gate is exactly 0.

    Args:
        x: [..., K], or [..., len(keep_in)] with `compact_in`.
        weight: [N, K], frozen, in x's dtype; gets no gradient.
        bias: [N], frozen.
        lora_a, lora_b: [R, K] and [N, R], both or neither; any float dtype.
        scaling: s, LoRA's alpha / rank.
        in_gate, out_gate: [K] and [N]; any float dtype. Exact zeros get gradient 0 (they come from a clamp).
        backend: "torch", "triton" or None (environment variable NUTEPRUNE_KERNELS if set, else triton on a GPU).
        keep_in, keep_out: sorted int64 indices of the kept units; the others count as gate 0. Found here where a gate
            is given without its list (on a GPU that waits for the device: pass the list if you know it).
        compact_in: x holds only the kept inputs. compact_out: return only the kept outputs. Each needs its list.

    Returns:
        [..., N] with exact zeros at removed outputs, or [..., len(keep_out)] with `compact_out`.

    Raises:
        ValueError: an unknown backend. Shapes, dtypes and devices that fit together are the caller's to see to.
    """
    keep_in = _resolve_keep(in_gate, keep_in, weight.shape[1])
    keep_out = _resolve_keep(out_gate, keep_out, weight.shape[0])
    compact = compact_in and keep_in is not None, compact_out and keep_out is not None
    gates, lists = (in_gate, out_gate), (keep_in, keep_out)
    return known_lists(x, weight, bias, lora_a, lora_b, *gates, *lists, float(scaling), *compact, backend=backend)


def known_lists(x: Tensor, weight: Tensor, *operands, backend: str | None = None) -> Tensor:
    """`masked_lora_linear` for a caller that knows which units are removed.

    Args:
        operands: bias, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out (None: nothing is removed), scaling,
            compact_in, compact_out; a compact side has its list. Perhaps behind them a pair `whole`, see `Product`.
    """
    if choose_backend(x, backend) == "torch":
        return torch_path.torch_linear(x, weight, *operands)
    return _module("masked_lora").triton_linear(x, weight, *operands)


def product_of(*operands) -> "Product":
    """What the kernels keep of a projection from call to call, see `projection_kernels`.

    Args:
        operands: weight and the operands behind it, as for `known_lists`.
    """
    return _module("masked_lora").product_of(*operands)


def projection_kernels(x: Tensor) -> Callable[..., tuple[Tensor, ...]] | None:
    """`masked_lora.triton_linears`, for products of one x, where its kernels run on x, else None."""
    return None if choose_backend(x) == "torch" else _module("masked_lora").triton_linears


def rowwise_kernels(*tensors: Tensor) -> ModuleType | None:
    """`kernels.rowwise` where its kernels run on these tensors, else None."""
    if choose_backend(tensors[0]) == "torch":
        return None
    rowwise = _module("rowwise")
    return rowwise if rowwise.applies(*tensors) else None


def ffn_kernels(x: Tensor) -> Callable[..., Tensor] | None:
    """`kernels.ffn.gated_ffn` where its kernels run on x, else None."""
    return None if rowwise_kernels(x) is None else _module("ffn").gated_ffn


@cache
def _module(name: str) -> ModuleType:
    """A module that imports triton, when it is first needed."""
    return importlib.import_module(f"nuteprune.kernels.{name}")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def into_grad() -> AbstractContextManager[None]:
    """See `masked_lora.into_grad`; nothing where triton is not installed."""
    return _module("masked_lora").into_grad() if _has_triton() else nullcontext()


def choose_backend(x: Tensor, backend: str | None = None) -> str:
    """ "torch" or "triton" for a tensor: the argument, else NUTEPRUNE_KERNELS, else by device; torch without values.

    Raises:
        ValueError: the name is neither.
    """
    chosen = backend or os.environ.get(ENV) or None
    if chosen not in (None, *BACKENDS):
        raise ValueError(f"kernel backend {chosen!r} is unknown: use one of {', '.join(BACKENDS)} (or unset {ENV})")
    if _has_no_values(x):
        return "torch"
    if chosen is None:
        on_gpu = x.is_cuda and x.dtype != torch.float64  # is_cuda holds for ROCm too
        return "triton" if on_gpu and _has_triton() else "torch"
    return chosen


def _has_no_values(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def _resolve_keep(gate: Tensor | None, keep: Tensor | None, size: int) -> Tensor | None:
    """The kept units, or None when there is nothing to skip."""
    if keep is None:
        if gate is None or _has_no_values(gate):
            return None
        keep = gate.detach().nonzero().flatten()
    return None if keep.numel() == size else keep
