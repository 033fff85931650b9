"""The kernels beside the projections under the interpreter, against the fp64 reference: values and gradients."""

from functools import partial

import pytest
import torch
from kernels_cases import DEVICE, GRADS, TOLERANCE, Case, as_double, assert_near, build, value_and_grads
from torch.utils.checkpoint import checkpoint

from nuteprune.kernels import reference
from nuteprune.kernels.api import ffn_kernels, into_grad, masked_lora_linear, product_of, rowwise_kernels

pytest.importorskip("triton", reason="triton has no build for this platform")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def triton_on_poisoned_memory(monkeypatch):
    """Fresh memory is filled with NaN, so an element that no program writes fails the comparison."""
    monkeypatch.setenv("NUTEPRUNE_KERNELS", "triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def compare(ours, wanted, leaves: list[torch.Tensor]) -> None:
    """Values and gradients of a function of leaves, and the values without autograd."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    got, want = ours(*leaves), wanted(*doubles)
    got, want = ((out,) if isinstance(out, torch.Tensor) else out for out in (got, want))
    upstream = [drawn(*y.shape, dtype=y.dtype, seed=5) for y in got]
    grads = torch.autograd.grad(got, leaves, upstream)
    grads_wanted = torch.autograd.grad(want, doubles, [g.double() for g in upstream])
    for number, (value, right) in enumerate(zip((*got, *grads), (*want, *grads_wanted), strict=True)):
        assert_near(str(number), value, right, TOLERANCE[value.dtype])
    with torch.no_grad():
        again = ours(*leaves)
    for value, right in zip((again,) if isinstance(again, torch.Tensor) else again, want, strict=True):
        assert_near("without autograd", value, right, TOLERANCE[value.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [(1e-5, 0.0, True), (1e-6, 1.0, False)], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", [(4, 3), (5, 33), (2, 3, 257), (2, 3, 4, 6), (0, 8)])
def test_rms_norm(shape, form, dtype):
    weight = drawn(shape[-1], dtype=dtype, seed=1)
    ours = rowwise_kernels(weight).rms_norm
    right = partial(reference.rms_norm, weight=weight.double(), eps=form[0], offset=form[1], rounds=form[2])
    compare(lambda x: ours(x, weight, *form), right, [drawn(*shape, dtype=dtype)])


def test_rms_norm_of_what_has_gaps():
    weight, wide = drawn(6, seed=1), drawn(2, 5, 12)
    for x in (wide[..., :6], wide[..., ::2], wide.transpose(0, 1)[..., 3:9]):
        compare(lambda x: rowwise_kernels(x).rms_norm(x, weight, 1e-6), partial(
            reference.rms_norm, weight=weight.double(), eps=1e-6), [x])  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(3, 1, 6), (4, 4, 8), (2, 0, 64)])
@pytest.mark.parametrize("angles", [1, 2])
def test_rotary(angles, heads, groups, width, dtype):
    q, k = (drawn(2, 37, n, width, dtype=dtype, seed=n).transpose(1, 2) for n in (heads, groups))
    cos, sin = (drawn(angles, 37, width, seed=7 + n).to(dtype) for n in range(2))
    right = partial(reference.rotary, cos=cos.double(), sin=sin.double())
    compare(lambda q, k: rowwise_kernels(q, k).rotary(q, k, cos, sin), right, [q, k])


def ffn_case(kind: str | None, dtype: torch.dtype) -> tuple[torch.Tensor, list[dict]]:
    """x, and the keyword arguments of gate, up and down, whose inner side has the given kind of gate."""
    shared = {"dtype": dtype, "bias": kind == "half"}
    compact = kind is not None
    gate, up = (build(Case(lead=(2, 9), k=20, n=24, out_kind="list" if compact else None, seed=n, **shared))
                for n in (0, 1))  # fmt: skip
    down = build(Case(lead=(2, 9), k=24, n=20, in_kind=kind, out_kind="soft", seed=2, **shared))
    if compact:
        keep = down["in_gate"].detach().nonzero().flatten()
        for part in (gate, up):
            part.update(keep_out=keep, compact_out=True)
        down.update(keep_in=keep, compact_in=True)
    x = gate.pop("x")
    up.pop("x"), down.pop("x")
    return x, [gate, up, down]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, "half", "zero"])
@pytest.mark.parametrize("gelu", [False, True])
def test_gated_ffn(gelu, kind, dtype):
    x, parts = ffn_case(kind, dtype)
    order = ("weight", "bias", "lora_a", "lora_b", "in_gate", "out_gate", "keep_in", "keep_out", "scaling",
             "compact_in", "compact_out")  # fmt: skip
    leaves = [x, *(part[name] for part in parts for name in GRADS if part.get(name) is not None)]
    doubles = [as_double(part) for part in parts]
    wide = x.detach().double().requires_grad_()
    right_leaves = [wide, *(part[name] for part in doubles for name in GRADS if part.get(name) is not None)]
    products = tuple(product_of(*(part[name] for name in order)) for part in parts)
    got = ffn_kernels(x)(x, products, gelu)
    want = reference.gated_ffn(wide, *doubles, gelu)
    upstream = drawn(*got.shape, dtype=dtype, seed=5)
    assert_near("y", got, want, TOLERANCE[dtype])
    pairs = zip(torch.autograd.grad(got, leaves, upstream, allow_unused=True),
                torch.autograd.grad(want, right_leaves, upstream.double(), allow_unused=True), strict=True)  # fmt: skip
    for number, (value, right) in enumerate(pairs):
        assert_near(str(number), value, right, 2 * TOLERANCE[dtype])
    with torch.no_grad():
        again = ffn_kernels(x)(x, products, gelu)
    assert_near("without autograd", again, want, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", [None, "half"])
def test_projections_of_one_input_together(kind):
    from nuteprune.kernels.masked_lora import triton_linears

    cases = [build(Case(lead=(2, 5), k=33, n=n, in_kind=kind, out_kind="soft", seed=n)) for n in (17, 8, 8)]
    x = cases[0]["x"]
    order = ("weight", "bias", "lora_a", "lora_b", "in_gate", "out_gate", "keep_in", "keep_out", "scaling",
             "compact_in", "compact_out")  # fmt: skip
    for case in cases:
        if kind:
            case["keep_in"] = case["in_gate"].detach().nonzero().flatten()
    together = triton_linears(x, tuple(product_of(*(case[name] for name in order)) for case in cases))
    apart = [masked_lora_linear(**{**case, "x": x}) for case in cases]
    leaves = [x, *(case[name] for case in cases for name in GRADS[1:] if case[name] is not None)]
    upstream = [drawn(*y.shape, seed=5) for y in together]
    for value, right in zip(
        (*together, *torch.autograd.grad(together, leaves, upstream)),
        (*apart, *torch.autograd.grad(apart, leaves, upstream)), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(value, right)


def test_measuring_tile_sizes_adds_nothing(monkeypatch):
    from nuteprune.kernels import launch, tuning
    from nuteprune.kernels.masked_lora import triton_linears

    measured = []

    def measure(product, x, run):
        measured.append(product)
        for _ in range(2):
            run(tuning.INTERPRETER)
        return tuning.INTERPRETER

    case = build(Case(lead=(2, 5)))
    x = case["x"]
    upstream = [drawn(2, 5, 17)] * 2

    def gradient():
        parts = [product_of(case["weight"], case["bias"], case["lora_a"], case["lora_b"]) for _ in range(2)]
        return torch.autograd.grad(triton_linears(x, tuple(parts)), x, upstream)

    want = gradient()
    monkeypatch.setattr(launch, "config_of", measure)
    torch.testing.assert_close(gradient(), want)
    assert len(measured) == 4


def test_a_product_forgets_launches_of_old():
    """An expert gets another number of tokens in each batch, and its product lives as long as the run."""
    from nuteprune.kernels.masked_lora import triton_linears
    from nuteprune.kernels.product import PLANS

    case = build(Case(k=3, n=4, rank=20))  # so many ranks are a launch of their own
    product = product_of(*(case[name] for name in ("weight", "bias", "lora_a", "lora_b")))
    parts = product, product.skinny, product.back, product.back.skinny
    for count in range(1, PLANS + 5):
        x = drawn(count, 3).requires_grad_()
        (y,) = triton_linears(x, (product,))
        y.sum().backward()
        torch.testing.assert_close(y, masked_lora_linear(**{**case, "x": x, "scaling": 1.0}, backend="torch"))
        assert all(0 < len(part.plans) <= PLANS for part in parts)


@pytest.mark.parametrize(("kind", "recomputed"), [("half", False), ("list", False), ("half", True)])
def test_gradients_added_in_place_are_those_that_autograd_adds(kind, recomputed):
    kwargs = build(Case(lead=(2, 9), in_kind=kind, out_kind=kind))
    upstream = drawn(2, 9, 17, seed=5)
    want = value_and_grads(masked_lora_linear, kwargs, upstream)
    for name in ("lora_a", "lora_b"):
        kwargs[name].grad = torch.ones_like(kwargs[name])
    before = {name: kwargs[name].grad for name in ("lora_a", "lora_b")}
    call = partial(checkpoint, masked_lora_linear, use_reentrant=False) if recomputed else masked_lora_linear
    with into_grad():
        y = call(**kwargs)
    y.backward(upstream)
    for name, grad in before.items():
        assert kwargs[name].grad is grad
        torch.testing.assert_close(grad, 1 + want[name])
    torch.testing.assert_close(kwargs["x"].grad, want["x"])
    torch.testing.assert_close(value_and_grads(masked_lora_linear, kwargs, upstream)["lora_a"], want["lora_a"])
