"""What autograd keeps and computes, the same for both backends."""

from functools import partial

import pytest
import torch
from kernels_cases import Case, as_double, assert_near, build, value_and_grads
from torch.utils.checkpoint import checkpoint

from nuteprune.kernels import reference
from nuteprune.kernels.api import masked_lora_linear


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
    want = value_and_grads(reference.masked_lora_linear, as_double(kwargs), got["upstream"])
    for name, value in want.items():
        assert_near(name, got[name], value, 1e-5)
