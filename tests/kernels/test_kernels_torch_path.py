"""The torch path against the fp64 reference, and the choice of a backend."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_cases import Case, build, check

from nuteprune.kernels import reference
from nuteprune.kernels.api import masked_lora_linear

torch_linear = partial(masked_lora_linear, backend="torch")

KINDS = [None, "ones", "soft", "half", "zero", "list", "none_kept"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_kind", KINDS)
@pytest.mark.parametrize("in_kind", KINDS)
def test_value_and_gradients(in_kind, out_kind, dtype):
    check(torch_linear, Case(in_kind=in_kind, out_kind=out_kind, dtype=dtype))


@pytest.mark.parametrize("kind", ["half", "zero", "list", "none_kept", "ones"])
@pytest.mark.parametrize(("compact_in", "compact_out"), [(True, False), (False, True), (True, True)])
def test_compact(kind, compact_in, compact_out):
    case = Case(lead=(2, 5), in_kind=kind, out_kind=kind, compact_in=compact_in, compact_out=compact_out)
    check(torch_linear, case)


@pytest.mark.parametrize("tokens", [0, 1, 5, 123])
@pytest.mark.parametrize("rank", [0, 1, 64])
def test_merged_and_separate_lora(tokens, rank):
    check(torch_linear, Case(lead=(tokens,), k=65, n=31, rank=rank, in_kind="half", out_kind="soft"))


@given(
    lead=st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple),
    k=st.integers(1, 40),
    n=st.integers(1, 40),
    rank=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    gate_dtype=st.sampled_from([None, torch.float32]),
    lora_dtype=st.sampled_from([None, torch.float32]),
    in_kind=st.sampled_from(KINDS),
    out_kind=st.sampled_from(KINDS),
    bias=st.booleans(),
    strided=st.booleans(),
    scaling=st.sampled_from([1.0, 0.25, 2.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_anything(**drawn):
    check(torch_linear, Case(**drawn))


def test_reference_gradients_are_derivatives():
    kwargs = build(Case(lead=(3,), k=5, n=4, rank=2, dtype=torch.float64, in_kind="soft", out_kind="soft"))
    names = ["x", "lora_a", "lora_b", "in_gate", "out_gate"]

    def call(*leaves):
        return reference.reference_linear(**{**kwargs, **dict(zip(names, leaves, strict=True))})

    assert torch.autograd.gradcheck(call, [kwargs[n] for n in names])


def test_meta_device():
    kwargs = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in build(Case(in_kind="half")).items()}
    assert masked_lora_linear(**kwargs).shape == (7, 17)


def test_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("NUTEPRUNE_KERNELS", "nonsense")
    with pytest.raises(ValueError, match="unset NUTEPRUNE_KERNELS"):
        masked_lora_linear(**build(Case()))
