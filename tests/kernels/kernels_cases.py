"""Random problems, and one comparison of value and every gradient with the fp64 reference, for all kernel tests."""

import os
from dataclasses import dataclass

import torch

from nuteprune.kernels import reference

# TRITON_INTERPRET=0 on a machine with a GPU runs the same tests on the real thing.
DEVICE = "cuda" if os.environ.get("TRITON_INTERPRET") == "0" and torch.cuda.is_available() else "cpu"
GRADS = ("x", "lora_a", "lora_b", "in_gate", "out_gate")
# Largest error allowed, as a share of the largest magnitude of the reference tensor (inputs are O(1)).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """One problem. Gate kinds: None, "ones", "soft" (0.1 to 1), "half" (half exact zeros), "zero" (all of them),
    "list" (no gate, a random keep list), "none_kept" (no gate, an empty list)."""

    lead: tuple[int, ...] = (7,)
    k: int = 33
    n: int = 17
    rank: int = 4
    dtype: torch.dtype = torch.float32
    gate_dtype: torch.dtype | None = None
    lora_dtype: torch.dtype | None = None
    in_kind: str | None = None
    out_kind: str | None = None
    bias: bool = True
    compact_in: bool = False
    compact_out: bool = False
    scaling: float = 0.5
    strided: bool = False
    seed: int = 0


def _gate(kind: str | None, size: int, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(gate, keep list) of a kind; the list is None where the library must find it."""
    if kind is None:
        return None, None
    if kind == "none_kept":
        return None, torch.zeros(0, dtype=torch.int64)
    if kind == "list":
        return None, (torch.rand(size) < 0.6).nonzero().flatten()
    gate = torch.rand(size) * 0.9 + 0.1
    if kind == "ones":
        gate = torch.ones(size)
    elif kind == "half":
        gate = gate * (torch.rand(size) < 0.5)
    elif kind == "zero":
        gate = torch.zeros(size)
    return gate.to(dtype), None


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values behind a stride of 2 in the last dimension and a gap between rows."""
    big = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
    view = big[..., 1 : 1 + 2 * tensor.shape[-1] : 2]
    view.copy_(tensor)
    return view


def build(case: Case) -> dict:
    """Keyword arguments of `masked_lora_linear` for a case; the five differentiable ones are leaves."""
    with torch.device(DEVICE):
        return _build(case)


def _build(case: Case) -> dict:
    torch.manual_seed(case.seed)
    dtype, lora_dtype = case.dtype, case.lora_dtype or case.dtype
    in_gate, keep_in = _gate(case.in_kind, case.k, case.gate_dtype or dtype)
    out_gate, keep_out = _gate(case.out_kind, case.n, case.gate_dtype or dtype)
    if case.compact_in and keep_in is None:
        keep_in = in_gate.nonzero().flatten()
    if case.compact_out and keep_out is None:
        keep_out = out_gate.nonzero().flatten()
    width = keep_in.numel() if case.compact_in else case.k
    x = torch.randn(*case.lead, width).to(dtype)
    weight = (torch.randn(case.n, case.k) / max(case.k, 1) ** 0.5).to(dtype)
    out = {"x": _strided(x) if case.strided else x, "weight": _strided(weight) if case.strided else weight}
    out["bias"] = torch.randn(case.n).to(dtype) if case.bias else None
    if case.rank:
        out["lora_a"] = (torch.randn(case.rank, case.k) / max(case.k, 1) ** 0.5).to(lora_dtype)
        out["lora_b"] = (torch.randn(case.n, case.rank) / case.rank**0.5).to(lora_dtype)
    out.update(in_gate=in_gate, out_gate=out_gate, keep_in=keep_in, keep_out=keep_out, scaling=case.scaling)
    out.update(compact_in=case.compact_in, compact_out=case.compact_out)
    for name in GRADS:
        if out.get(name) is not None:
            out[name] = out[name].detach().requires_grad_()
    return out


def as_double(kwargs: dict) -> dict:
    """The same problem in fp64, with leaves of its own."""
    out = dict(kwargs)
    for name, value in kwargs.items():
        if torch.is_tensor(value) and value.is_floating_point():
            out[name] = value.detach().double().requires_grad_(value.requires_grad)
    return out


def value_and_grads(fn, kwargs: dict, upstream: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """{"y": …, "x": dx, …} for the leaves of `kwargs`; `upstream` is ∂L/∂y (drawn at random if None, as "upstream")."""
    y = fn(**kwargs)
    if upstream is None:
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    names = [n for n in GRADS if kwargs.get(n) is not None and kwargs[n].requires_grad]
    grads = torch.autograd.grad(y, [kwargs[n] for n in names], upstream.to(y))
    return {"y": y.detach(), "upstream": upstream, **dict(zip(names, grads, strict=True))}


def assert_near(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert got.shape == want.shape, name
    assert not got.isnan().any(), f"{name} holds NaN: an element was never written"
    if got.numel():
        error = (got.double() - want).abs().max().item()
        assert error <= tolerance * max(want.abs().max().item(), 1e-6), f"{name}: error {error:.3g}"


def check(fn, case: Case, tolerance: float | None = None) -> None:
    """Value and every gradient of `fn` against the fp64 reference; dtypes, and exact zeros at zero gates, too."""
    kwargs = build(case)
    got = value_and_grads(fn, kwargs)
    want = value_and_grads(reference.reference_linear, as_double(kwargs), got["upstream"])
    for name, value in got.items():
        if name == "upstream":
            continue
        coarsest = max(TOLERANCE[case.dtype], TOLERANCE[value.dtype])  # fp32 gates of an fp64 call round like fp32
        assert_near(name, value, want[name], tolerance or coarsest)
        if name != "y":
            assert value.dtype == kwargs[name].dtype, name
        if name.endswith("_gate"):
            assert (value[kwargs[name] == 0] == 0).all(), f"{name}: gradient at an exact zero"
