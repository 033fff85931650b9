"""What autograd keeps and computes, the same for both backends."""

from functools import partial

import pytest
import torch
from kernels_cases import TOLERANCE, Case, as_double, assert_near, build, value_and_grads
from torch.utils.checkpoint import checkpoint

from nuteprune.kernels import reference
from nuteprune.kernels.api import into_grad, known_lists, masked_lora_linear


@pytest.fixture(params=["torch", "triton"])
def call(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton has no build for this platform")
    return partial(masked_lora_linear, backend=request.param)


def test_autograd_keeps_nothing_of_the_weights_size(call):
    kwargs = build(Case(lead=(4,), k=64, n=48, in_kind="half", out_kind="half"))
    weight, saved = torch.nn.Parameter(kwargs["weight"], requires_grad=False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(**{**kwargs, "weight": weight}).sum()
    assert all(t is weight for t in saved if t.numel() >= 64 * 48)


def test_weight_is_read_again_in_backward(call):
    """ZeRO-3 empties the Parameter after forward and gathers it anew for backward."""
    kwargs = build(Case(in_kind="half", out_kind="soft"))
    whole, want = kwargs["weight"], value_and_grads(call, kwargs)
    weight = torch.nn.Parameter(whole.clone(), requires_grad=False)
    y = call(**{**kwargs, "weight": weight})
    weight.data = whole.new_empty(0)
    weight.data = whole.clone()
    torch.testing.assert_close(torch.autograd.grad(y, kwargs["x"], want["upstream"])[0], want["x"])


def test_only_the_needed_gradients(call):
    kwargs = build(Case(in_kind="soft", out_kind="soft"))
    want = value_and_grads(call, kwargs)
    for name in ("x", "lora_a", "lora_b", "in_gate", "out_gate"):
        one = {k: v.detach() if torch.is_tensor(v) else v for k, v in kwargs.items()}
        one[name].requires_grad_()
        got = value_and_grads(call, one, want["upstream"])
        torch.testing.assert_close(got[name], want[name])


def test_no_grad_and_checkpointing(call):
    kwargs = build(Case(in_kind="half", out_kind="half"))
    want = value_and_grads(call, kwargs)
    with torch.no_grad():
        assert not call(**kwargs).requires_grad

    got = value_and_grads(partial(checkpoint, call, use_reentrant=False), kwargs, want["upstream"])
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


def test_gates_that_vanish_in_half_precision_have_no_gradient(call):
    kwargs = build(Case(dtype=torch.float16, gate_dtype=torch.float32, in_kind="soft", out_kind="soft"))
    for name in ("in_gate", "out_gate"):
        with torch.no_grad():
            kwargs[name][0] = 1e-9
    got = value_and_grads(call, kwargs)
    assert all(value.isfinite().all() for value in got.values())


def test_lists_may_hold_units_whose_gate_is_zero(call):
    """A caller may keep yesterday's list: zeros inside it still multiply, and get no gradient."""
    kwargs = build(Case(in_kind="half", out_kind="half"))
    stale = {"keep_in": torch.arange(1, 33), "keep_out": torch.arange(16)}
    kwargs.update({name: keep.to(kwargs["x"].device) for name, keep in stale.items()})
    got = value_and_grads(call, kwargs)
    want = value_and_grads(reference.reference_linear, as_double(kwargs), got["upstream"])
    for name, value in want.items():
        assert_near(name, got[name], value, 1e-5)


@pytest.mark.parametrize("rank", [4, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_that_are_not_trained_ride_along_and_get_no_gradient(call, rank, dtype):
    """Against the reference with one pair of all ranks, of whose gradient that of the last ones is wanted."""
    backend, case = call.keywords["backend"], Case(rank=rank, dtype=dtype, in_kind="half", out_kind="soft", bias=False)
    kwargs = build(case)
    whole = kwargs["lora_a"].detach(), kwargs["lora_b"].detach()
    a, b = whole[0][-3:].float().requires_grad_(), whole[1][:, -3:].float().requires_grad_()
    gates, keep = (kwargs["in_gate"], kwargs["out_gate"]), kwargs["in_gate"].detach().nonzero().flatten()
    operands = (None, a, b, *gates, keep, None, kwargs["scaling"], False, False, whole)
    want = value_and_grads(reference.reference_linear, as_double(kwargs), None)
    leaves = kwargs["x"], a, b, *gates
    y = known_lists(kwargs["x"], kwargs["weight"], *operands, backend=backend)
    got = torch.autograd.grad(y, leaves, want["upstream"].to(y))
    want |= {"lora_a": want["lora_a"][-3:], "lora_b": want["lora_b"][:, -3:]}
    tolerance = TOLERANCE[dtype]
    for name, value in zip(("y", "x", "lora_a", "lora_b", "in_gate", "out_gate"), (y, *got), strict=True):
        assert_near(name, value, want[name], tolerance)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    with into_grad():
        known_lists(kwargs["x"], kwargs["weight"], *operands, backend=backend).backward(want["upstream"].to(y))
    for name, leaf in (("lora_a", a), ("lora_b", b)):
        assert_near(name, leaf.grad - 1, want[name], tolerance)
