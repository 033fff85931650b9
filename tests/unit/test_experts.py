"""Mixtures of experts: what the router may choose, which structures selection gives, what is read for a token."""

from dataclasses import replace

import pytest
import torch
from tiny import VOCAB, tiny_config, tiny_model

from nuteprune.arch import read_spec
from nuteprune.config import GateConfig, LoraConfig
from nuteprune.errors import UserError
from nuteprune.masks import Gates, Kept, Rounding, check_target, fit_shape, select_units, sparsity_of, unit_shape
from nuteprune.model.layers import GatedRouter, build_view
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.sizes import read_parameters, total_parameters
from nuteprune.planning.models import named_spec

NAMES = ("qwen3_moe", "mixtral")
IDS = torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(3))
names = pytest.mark.parametrize("name", NAMES)


def routed(name: str, experts: torch.Tensor, skip: bool = True):
    """Numbers of the chosen experts and outputs of the FFNs, layer by layer, with these gates of experts."""
    hf = tiny_model(name)
    spec = read_spec(hf.config)
    model, chosen, outputs = PairedModel(hf, spec, LoraConfig(targets=[])), [], []
    for layer in model.layers:
        mlp = layer.layer.mlp
        assert isinstance(mlp.gate, GatedRouter)
        mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
        mlp.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        model.hidden(IDS, build_view(spec, Gates(experts=experts), {}, 1.0, torch.float32, skip_removed=skip))
    return chosen, outputs


@names
@pytest.mark.parametrize("skip", [True, False])
def test_the_router_chooses_among_the_experts_that_stay(name, skip):
    spec = read_spec(tiny_config(name))
    experts = torch.ones(unit_shape(spec, "experts"))
    experts[0, 1] = 0
    experts[2, : -spec.top_k] = 0  # exactly as many as it chooses
    chosen, _ = routed(name, experts, skip)
    for layer, index in enumerate(chosen):
        assert index.shape == (IDS.numel(), spec.top_k)
        assert set(index.unique().tolist()) <= set(experts[layer].nonzero().flatten().tolist())
        assert all(len(row.unique()) == spec.top_k for row in index)
    before, _ = routed(name, torch.ones_like(experts))
    assert (before[0] == 1).any(), "the removed expert was never chosen anyway"


@names
def test_with_fewer_open_than_it_chooses_closed_experts_add_nothing(name):
    spec = read_spec(tiny_config(name))
    experts = torch.ones(unit_shape(spec, "experts"))
    experts[1] = 0
    experts[2, 1:] = 0
    (_, _, last), (_, second, third) = routed(name, experts)
    assert not second.any()
    assert third.any()
    assert set(last.unique().tolist()) == set(range(spec.top_k))
    for skipped, dense in zip(routed(name, experts)[1], routed(name, experts, skip=False)[1], strict=True):
        torch.testing.assert_close(skipped, dense)


@names
@pytest.mark.parametrize("target", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("units", [["experts"], ["experts", "ffn"], ["kv_groups", "experts", "ffn", "hidden"], ["ffn"]])
def test_uniform_structures_are_those_of_a_stock_class(name, units, target):
    spec = read_spec(tiny_config(name, hidden_size=128, intermediate_size=256, moe_intermediate_size=256,
                                 num_experts=32, num_local_experts=32))  # fmt: skip
    config = GateConfig(shape="uniform", units=units)
    check_target(spec, config, target)
    generator = torch.Generator().manual_seed(0)
    scores = {kind: torch.randn(unit_shape(spec, kind), generator=generator) for kind in units}
    gates = select_units(spec, scores, target, "uniform", Rounding.of(config))
    kept = Kept.of(spec, gates)
    assert kept.is_uniform
    widths = {width for layer in kept.ffn_widths for width in layer}
    assert len(widths) == 1
    assert widths.pop() % 8 == len(kept.hidden) % 8 == 0
    assert {len(experts) for experts in kept.experts} == {len(kept.experts[0])}
    assert len(kept.experts[0]) >= spec.top_k
    assert abs(sparsity_of(spec, gates) - target) <= 0.01


@names
@pytest.mark.parametrize("target", [0.1, 0.4])
@pytest.mark.parametrize("shape", ["per_layer_ffn", "per_layer"])
@pytest.mark.parametrize("units", [["experts", "ffn"], ["kv_groups", "experts", "ffn", "hidden", "layers"], ["ffn"]])
def test_free_structures_have_experts_of_one_width_in_a_layer(name, units, shape, target):
    spec = read_spec(tiny_config(name, hidden_size=128, intermediate_size=256, moe_intermediate_size=256,
                                 num_experts=32, num_local_experts=32))  # fmt: skip
    config = GateConfig(shape=shape, units=units)
    check_target(spec, config, target)
    generator = torch.Generator().manual_seed(0)
    scores = {kind: torch.randn(unit_shape(spec, kind), generator=generator) for kind in units}
    scores["ffn"] -= torch.arange(spec.layers)[:, None]  # the first layers deserve more
    gates = select_units(spec, scores, target, shape, Rounding.of(config))
    kept = Kept.of(spec, gates)
    assert kept.experts_are_alike
    widths = [set(kept.ffn_widths[i]) for i in kept.layers]
    assert max(widths[0]) > max(widths[-1])
    assert all(width % 8 == 0 for layer in widths for width in layer)
    assert all(len(kept.experts[i]) >= spec.top_k for i in kept.layers)
    assert shape == "per_layer" or kept.attention_is_alike
    assert abs(sparsity_of(spec, gates) - target) <= 0.01
    assert fit_shape(spec, gates, scores, target, shape, Rounding()) is gates
    ragged = gates.ffn.clone()
    ragged[0, ragged[0].nonzero()[0]] = 0  # as in a snapshot
    settled = fit_shape(spec, replace(gates, ffn=ragged), scores, target, shape, Rounding.of(config))
    assert Kept.of(spec, settled).experts_are_alike


@names
def test_as_many_experts_as_the_router_chooses_always_stay(name):
    spec = read_spec(tiny_config(name))
    with pytest.raises(UserError, match=r"removing experts takes away at most 0\.\d+"):
        check_target(spec, GateConfig(shape="uniform", units=["experts"]), 0.6)
    scores = {"experts": torch.randn(unit_shape(spec, "experts"))}
    for shape in ("uniform", "per_layer"):
        gates = select_units(spec, scores, 0.9, shape)
        assert (gates.experts.sum(1) == spec.top_k).all()
    few = torch.zeros(unit_shape(spec, "experts"))
    few[:, 0] = 1
    assert not Kept.of(spec, Gates(experts=few)).is_uniform


@names
def test_an_expert_is_all_its_units(name):
    spec = read_spec(tiny_config(name))
    experts = torch.ones(unit_shape(spec, "experts"))
    experts[1, 2] = 0
    ffn = torch.ones(spec.layers, spec.experts, spec.ffn)
    ffn[1, 2] = 0
    whole, units = Gates(experts=experts), Gates(ffn=ffn.flatten(1))
    assert torch.equal(whole.ffn_gate(spec), units.ffn_gate(spec))
    assert sparsity_of(spec, whole) == sparsity_of(spec, units) > 0


@pytest.mark.parametrize(("name", "read"), [("qwen3-30b-a3b", 3.35e9), ("mixtral-8x7b", 12.88e9), ("llama-7b", 6.74e9)])
def test_parameters_read_for_a_token(name, read):
    spec = named_spec(name)
    assert read_parameters(spec) == pytest.approx(read, rel=0.005)
    assert (read_parameters(spec) < total_parameters(spec)) == (spec.experts > 1)
