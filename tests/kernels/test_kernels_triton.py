"""The triton kernels under the interpreter, against the fp64 reference. No tolerance differs from the torch path's."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernels_cases import DEVICE, Case, build, check

from nuteprune.kernels.api import masked_lora_linear

pytest.importorskip("triton", reason="triton has no build for this platform")

triton_linear = partial(masked_lora_linear, backend="triton")

KINDS = [None, "soft", "half", "zero", "list", "none_kept"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    ((1,), 1, 1),
    ((5,), 33, 123),
    ((2, 3), 65, 31),
    ((123,), 5, 33),
    ((3,), 257, 40),
    ((0,), 9, 4),
    ((2, 0), 9, 4),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is filled with NaN, so an element that no program writes fails the comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lead", "k", "n"), SHAPES)
def test_odd_shapes(lead, k, n, dtype):
    check(triton_linear, Case(lead=lead, k=k, n=n, dtype=dtype, in_kind="soft", out_kind="half"))


@pytest.mark.parametrize(("size", "stride"), [((5, 1, 8), (8, 40, 1)), ((1, 5, 8), (3, 8, 1))])
def test_strides_of_dimensions_of_one(size, stride):
    weight = torch.randn(6, 8, device=DEVICE)
    x = torch.randn(64, device=DEVICE).as_strided(size, stride)
    torch.testing.assert_close(triton_linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("out_kind", KINDS)
@pytest.mark.parametrize("in_kind", KINDS)
def test_gates_and_lists(in_kind, out_kind):
    check(triton_linear, Case(lead=(34,), k=35, n=40, in_kind=in_kind, out_kind=out_kind))


@pytest.mark.parametrize("kind", ["half", "zero", "list", "none_kept"])
@pytest.mark.parametrize(("compact_in", "compact_out"), [(True, False), (False, True), (True, True)])
def test_compact(kind, compact_in, compact_out):
    case = Case(lead=(2, 5), k=40, n=70, in_kind=kind, out_kind=kind, compact_in=compact_in, compact_out=compact_out)
    check(triton_linear, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 16, 17, 64, 128, 150])
def test_ranks(rank, dtype):
    check(triton_linear, Case(lead=(40,), rank=rank, dtype=dtype, in_kind="half", out_kind="soft"))


def test_many_rows_are_split_between_programs():
    check(triton_linear, Case(lead=(600,), k=5, n=3, in_kind="soft", out_kind="soft"))


@given(
    lead=st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple),
    k=st.integers(1, 70),
    n=st.integers(1, 70),
    rank=st.integers(0, 20),
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
@settings(
    max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)  # shrinking: minutes
def test_anything(**drawn):
    check(triton_linear, Case(**drawn))


def test_expanded_gradient():
    kwargs = build(Case(in_kind="half", out_kind="half"))
    want = torch.autograd.grad(masked_lora_linear(**kwargs, backend="torch").sum(), kwargs["x"])[0]
    torch.testing.assert_close(torch.autograd.grad(triton_linear(**kwargs).sum(), kwargs["x"])[0], want)


def test_fp64_is_refused():
    with pytest.raises(ValueError, match='backend="torch"'):
        triton_linear(**build(Case(dtype=torch.float64)))
