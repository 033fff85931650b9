"""Gates: the distribution, exact counts, the constraint in any budget, the structures that selection gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import CONFIGS, tiny_config, tiny_model

from nuteprune.arch import projections, read_spec
from nuteprune.config import GateConfig, load_config
from nuteprune.errors import UserError
from nuteprune.masks import (
    KINDS,
    Gates,
    Kept,
    MaskSet,
    Rounding,
    check_target,
    kept_parameters,
    select_units,
    sparsity_of,
    unit_shape,
)
from nuteprune.masks import hard_concrete as hc
from nuteprune.masks.counts import mean_counts
from nuteprune.masks.schedule import Schedule
from nuteprune.masks.selection import MEASURED, cheapest_units

SPEC = read_spec(tiny_config("llama"))


@pytest.mark.parametrize("name", CONFIGS)
def test_prunable_parameters_are_those_of_the_projections(name):
    model = tiny_model(name)
    counted = 0
    for layer in model.model.layers:
        for projection, (owner, attribute) in projections(layer).items():
            linear = getattr(owner, attribute)
            counted += linear.weight.numel()
            # The biases of o and down belong to the residual stream: they leave with no head and no FFN unit.
            if linear.bias is not None and projection not in ("o_proj", "down_proj"):
                counted += linear.bias.numel()
    assert read_spec(model.config).prunable == counted


def test_unsupported_family_names_the_supported_ones():
    from transformers import GPT2Config

    with pytest.raises(UserError, match=r"gpt2.*llama, mistral, qwen2, qwen3, granite, .*gemma3_text"):
        read_spec(GPT2Config())


@pytest.mark.parametrize("noise", [1.0, 0.3, 0.05])
def test_samples_are_open_as_often_as_the_closed_form_says(noise):
    log_alpha = torch.tensor([-3.0, -1.7, -1.6, 0.0, 2.0])[:, None].expand(5, 200_000)
    u = torch.rand(log_alpha.shape, generator=torch.Generator().manual_seed(0))
    z = hc.sample(log_alpha, u, 2 / 3, noise)
    assert ((z >= 0) & (z <= 1)).all()
    expected = hc.probability_open(log_alpha[:, 0], 2 / 3, noise)
    torch.testing.assert_close((z > 0).float().mean(1), expected, atol=4e-3, rtol=0)


@pytest.mark.parametrize("noise", [1.0, 0.1])
def test_mean_open_is_the_mean_of_open_samples(noise):
    log_alpha = torch.tensor([-2.0, -1.0, 0.0, 1.5])
    u = torch.rand(4, 400_000, generator=torch.Generator().manual_seed(0))
    z = hc.sample(log_alpha[:, None].expand_as(u), u, 2 / 3, noise)
    expected = torch.stack([row[row > 0].mean() if (row > 0).any() else torch.tensor(0.0) for row in z])
    opened = (z > 0).float().mean(1) > 1e-3
    torch.testing.assert_close(hc.mean_open(log_alpha, 2 / 3, noise)[opened], expected[opened], atol=1e-2, rtol=0)


def random_gates(generator: torch.Generator, units) -> Gates:
    return Gates(**{k: (torch.rand(unit_shape(SPEC, k), generator=generator) > 0.3).float() for k in units})


@hypothesis_settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sets(st.sampled_from(KINDS), min_size=1))
def test_kept_parameters_is_the_count_of_kept_rows_and_columns(seed, units):
    gates = random_gates(torch.Generator().manual_seed(seed), units)
    full = gates.full(SPEC)
    heads = full.head_gate(SPEC) != 0
    hidden = int(full.hidden.sum())
    counted = 0
    for layer in range(SPEC.layers):
        groups = heads[layer].reshape(SPEC.kv_heads, -1).any(-1).sum()
        counted += SPEC.head_dim * hidden * 2 * (int(heads[layer].sum()) + int(groups))
        counted += 3 * hidden * int((full.ffn_gate(SPEC)[layer] != 0).sum())
    assert sparsity_of(SPEC, gates) == pytest.approx(1 - counted / SPEC.prunable, abs=1e-12)


def test_expected_count_is_the_mean_over_samples():
    generator = torch.Generator().manual_seed(0)
    p = {k: torch.rand(unit_shape(SPEC, k), generator=generator, dtype=torch.float64) for k in KINDS}
    draws = [
        kept_parameters(SPEC, {k: (torch.rand(v.shape, generator=generator) < v).double() for k, v in p.items()})
        for _ in range(3000)
    ]
    mean = torch.stack(draws).mean()
    assert float(mean) == pytest.approx(float(kept_parameters(SPEC, p)), rel=0.03)


UNIT_SETS = [
    (["kv_groups", "ffn"], "uniform"),
    (["heads", "kv_groups", "ffn", "hidden"], "uniform"),
    (["kv_groups", "ffn", "layers"], "uniform"),
    ([], "per_layer_ffn"),
    (["heads", "kv_groups", "ffn", "hidden", "attn_sublayers", "ffn_sublayers"], "per_layer_ffn"),
    (["heads", "ffn", "hidden"], "per_layer"),
    (["heads", "kv_groups", "ffn", "hidden", "attn_sublayers", "ffn_sublayers"], "per_layer"),
]


def mask_set(units, shape, spec=SPEC, seed=0) -> MaskSet:
    masks = MaskSet(spec, GateConfig(units=units, shape=shape, ffn_multiple=1, hidden_multiple=1))
    generator = torch.Generator().manual_seed(seed)
    for la in masks.log_alpha.values():
        la.data.normal_(0, 2, generator=generator)
    return masks


@pytest.mark.parametrize(("units", "shape"), UNIT_SETS)
@pytest.mark.parametrize("noise", [1.0, 0.05])
def test_projection_holds_the_target(units, shape, noise):
    masks = mask_set(units, shape)
    masks.noise = noise
    for target in (0.02, 0.2, 0.5):
        masks.project(target)
        assert masks.expected_sparsity().item() == pytest.approx(target, abs=1e-4)


def test_projection_in_the_uniform_shape_keeps_equal_shares_in_every_layer():
    masks = mask_set(["kv_groups", "ffn"], "uniform")
    masks.project(0.4)
    share = hc.probability_open(masks.log_alpha["ffn"], masks.config.temperature, masks.noise).mean(1)
    torch.testing.assert_close(share, share.mean().expand_as(share), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("units", "shape"), UNIT_SETS)
def test_settled_gates_are_zero_or_one_and_expected_sparsity_is_their_count(units, shape):
    spec = read_spec(tiny_config("llama", hidden_size=96, intermediate_size=256, num_attention_heads=12))
    masks = mask_set(units, shape, spec)
    masks.settle(0.3, lambda structures: [0.0] * len(structures))
    for z in masks.fixed.as_dict().values():
        assert set(z.unique().tolist()) <= {0.0, 1.0}
    assert masks.expected_sparsity().item() == pytest.approx(sparsity_of(spec, masks.fixed), abs=1e-9)
    assert sparsity_of(spec, masks.fixed) == pytest.approx(0.3, abs=0.01)
    assert masks.sample(torch.Generator()) is masks.fixed


@pytest.mark.parametrize("spread", [0.01, 2.0])
@pytest.mark.parametrize("noise", [1.0, 0.05])
def test_deterministic_gates_close_as_many_units_as_expected(noise, spread):
    masks = mask_set(["ffn"], "per_layer")
    masks.log_alpha["ffn"].data.mul_(spread / 2)
    masks.noise = noise
    masks.project(0.3)
    z = masks.deterministic().ffn
    probability = hc.probability_open(masks.log_alpha["ffn"].detach(), masks.config.temperature, noise)
    assert (z == 0).sum() == round(float((1 - probability).sum()))
    assert masks.log_alpha["ffn"][z == 0].max() <= masks.log_alpha["ffn"][z > 0].min()
    assert z[z > 0].min() > 0.05


def test_deterministic_gates_of_the_published_noise_are_the_authors():
    """Layer by layer, as in CoFi's `_deterministic_z`, which the authors' code uses."""
    masks = MaskSet(SPEC, load_config(None, ["recipe=paper", "gates.units=[ffn,hidden]"]).gates)
    masks.noise = 1.0
    for la in masks.log_alpha.values():
        la.data.normal_(0.5, 1.5)
    gates = masks.deterministic()
    for la, z in ((masks.log_alpha["ffn"], gates.ffn), (masks.log_alpha["hidden"][None], gates.hidden[None])):
        for row, own in zip(la.detach(), z, strict=True):
            expected = torch.sigmoid(row / (2 / 3) * 0.8)
            zeros = round(len(row) - float(torch.sigmoid(row - 2 / 3 * torch.tensor(0.1 / 1.1).log()).sum()))
            expected[row.topk(zeros, largest=False).indices] = 0
            torch.testing.assert_close(own, expected)
            assert 0 < zeros < len(row)


def test_gates_closed_by_the_clamp_have_no_gradient():
    masks = mask_set(["ffn"], "per_layer")
    masks.project(0.5)
    z = masks.sample(torch.Generator().manual_seed(0)).ffn
    z.sum().backward()
    assert (masks.log_alpha["ffn"].grad[z.detach() == 0] == 0).all()
    assert (masks.log_alpha["ffn"].grad != 0).any()


@pytest.mark.parametrize("target", [0.1, 0.2, 0.35, 0.5, 0.7])
def test_uniform_selection_keeps_equal_counts_and_meets_the_target(target):
    spec = read_spec(
        tiny_config("llama", hidden_size=96, intermediate_size=256, num_attention_heads=12, num_key_value_heads=4)
    )
    scores = {k: torch.randn(unit_shape(spec, k)) for k in ("heads", "kv_groups", "ffn", "hidden")}
    gates = select_units(spec, scores, target, "uniform", Rounding(16, 8))
    in_groups = gates.head_gate(spec).unflatten(1, (spec.kv_heads, spec.group_size)).sum(-1)
    assert len(in_groups[in_groups > 0].unique()) == 1
    assert len((in_groups > 0).sum(1).unique()) == 1
    assert len(gates.ffn.sum(1).unique()) == 1
    assert sparsity_of(spec, gates) == pytest.approx(target, abs=0.01)


def wide_spec(name="llama", layers=30):
    """SmolLM2-135M's sizes in any family."""
    return read_spec(tiny_config(name, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                                 num_key_value_heads=3, head_dim=64, num_hidden_layers=layers))  # fmt: skip


def random_scores(spec, units, seed=0):
    """Scores whose mean differs from layer to layer, as learned ones do."""
    generator = torch.Generator().manual_seed(seed)
    scores = {k: torch.randn(unit_shape(spec, k), generator=generator) for k in units}
    return {k: s + torch.randn(len(s), *[1] * (s.dim() - 1), generator=generator) if k == "ffn" else s
            for k, s in scores.items()}  # fmt: skip


@pytest.mark.parametrize("target", [0.2, 0.35, 0.5, 0.7])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_free_ffn_widths_are_multiples_and_attention_is_whole(name, target):
    spec = wide_spec(name)
    config = GateConfig(units=["ffn"], shape="per_layer_ffn")
    check_target(spec, config, target)
    scores = random_scores(spec, ["ffn"])
    gates = select_units(spec, scores, target, "per_layer_ffn", Rounding.of(config))
    widths = gates.ffn.sum(1)
    assert (widths % 128 == 0).all()
    assert len(widths.unique()) > 4
    assert abs(sparsity_of(spec, gates) - target) <= 64 * spec.ffn_cost(spec.hidden) / spec.prunable
    for row, kept in zip(scores["ffn"], gates.ffn, strict=True):  # a layer keeps its best units
        assert not kept.any() or kept.all() or row[kept == 1].min() > row[kept == 0].max()


def test_free_ffn_widths_keep_the_blocks_with_the_highest_sums():
    spec = wide_spec(layers=4)
    scores = random_scores(spec, ["ffn"])["ffn"]
    gates = select_units(spec, {"ffn": scores}, 0.4, "per_layer_ffn", Rounding(128))
    blocks = scores.double().sort(dim=1, descending=True).values.unflatten(1, (12, 128)).sum(-1)
    kept = torch.arange(12) < gates.ffn.sum(1)[:, None] / 128
    assert blocks[kept].min() > blocks[~kept].max()
    layer = {"ffn": scores.clone()}
    layer["ffn"][2] -= 100  # worth nothing: the layer keeps no unit
    assert select_units(spec, layer, 0.4, "per_layer_ffn", Rounding(128)).ffn.sum(1)[2] == 0


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("units", [
    ["kv_groups", "ffn"], ["heads", "kv_groups", "ffn", "hidden"], ["ffn", "attn_sublayers", "ffn_sublayers"],
    ["heads", "kv_groups", "ffn", "hidden", "attn_sublayers", "ffn_sublayers"],
])  # fmt: skip
def test_attention_is_alike_where_there_is_any(units, parallel):
    spec = wide_spec()
    config = GateConfig(units=units, shape="per_layer_ffn", tensor_parallel=parallel)
    check_target(spec, config, 0.5)
    gates = select_units(spec, random_scores(spec, units), 0.5, "per_layer_ffn", Rounding.of(config))
    kept = Kept.of(spec, gates)
    assert kept.attention_is_alike
    assert all(len(layer) % parallel == 0 for layer in (*kept.kv_groups, *kept.ffn))
    assert all(len(layer) % 128 == 0 for layer in kept.ffn)
    assert abs(sparsity_of(spec, gates) - 0.5) <= 0.01
    for kind, counts in (("attn_sublayers", kept.heads), ("ffn_sublayers", kept.ffn)):
        if kind in units:
            gone = gates.as_dict()[kind] == 0
            assert gone.any()
            assert all(len(units) == 0 for units, absent in zip(counts, gone, strict=True) if absent)


@pytest.mark.parametrize("target", [0.2, 0.5])
@pytest.mark.parametrize(("units", "shape"), [
    (["kv_groups", "ffn", "layers"], "uniform"), (["heads", "kv_groups", "ffn", "hidden", "layers"], "uniform"),
    (["kv_groups", "ffn", "layers"], "per_layer_ffn"),
])  # fmt: skip
def test_of_the_structures_at_the_target_the_cheapest_is_taken(units, shape, target):
    spec, seen = wide_spec(), []
    scores = random_scores(spec, units)

    def loss(structures):
        """Cheapest where most is left of attention, and among those where the most layers are."""
        counts = [mean_counts(Kept.of(spec, gates)) for gates in structures]
        seen.extend(structures)
        return [-c.groups * c.heads - 0.01 * c.layers for c in counts]

    gates = cheapest_units(spec, scores, target, shape, Rounding(128, 64), loss)
    assert 2 <= len(seen) <= 2 * MEASURED
    assert all(abs(sparsity_of(spec, g) - target) <= 0.01 for g in seen)
    assert len({tuple(g.layers.tolist() + g.ffn.sum(1).tolist()) for g in seen}) > 1
    if shape == "uniform":
        assert all(Kept.of(spec, g).is_uniform for g in seen)
    attention = {c.groups * c.heads for c in (mean_counts(Kept.of(spec, g)) for g in seen)}
    best = mean_counts(Kept.of(spec, gates))
    assert best.groups * best.heads == max(attention) == 9
    again = cheapest_units(spec, scores, target, shape, Rounding(128, 64), loss)
    assert all(torch.equal(a, b) for a, b in zip(gates.as_dict().values(), again.as_dict().values(), strict=True))


def test_where_one_structure_meets_the_target_nothing_is_measured():
    def loss(_):
        raise AssertionError("measured")

    spec = wide_spec()
    for shape in ("uniform", "per_layer_ffn", "per_layer"):
        scores = random_scores(spec, ["ffn"])
        gates = cheapest_units(spec, scores, 0.4, shape, Rounding(128, 64), loss)
        assert torch.equal(gates.ffn, select_units(spec, scores, 0.4, shape, Rounding(128, 64)).ffn)


def test_a_structure_like_another_has_its_kind_at_another_sparsity():
    spec = wide_spec()
    scores = random_scores(spec, ["kv_groups", "ffn", "layers"])
    for layers, groups in ((20, 3), (25, 2)):
        within = Rounding(128, 64)
        sparse = cheapest_units(spec, scores, 0.5, "uniform", within, lambda structures, n=layers, k=groups: [
            abs(c.layers - n) + abs(c.groups - k)
            for c in (mean_counts(Kept.of(spec, g)) for g in structures)])  # fmt: skip
        rung = mean_counts(Kept.of(spec, select_units(spec, scores, 0.25, "uniform", within, sparse)))
        found = mean_counts(Kept.of(spec, sparse))
        assert (found.layers, found.groups) == (layers, groups)
        assert abs(rung.layers - (30 + layers) / 2) <= 1
        assert rung.groups in (groups, 3)


def test_projection_with_free_ffn_widths_levels_the_attention_only():
    masks = mask_set(["kv_groups", "ffn"], "per_layer_ffn")
    masks.project(0.4)
    share = {k: masks._open(la).mean(1) for k, la in masks.log_alpha.items()}
    torch.testing.assert_close(share["kv_groups"], share["kv_groups"].mean().expand_as(share["kv_groups"]), atol=1e-5,
                               rtol=0)  # fmt: skip
    assert share["ffn"].std() > 0.01


SERVED = {  # hidden, FFN, heads, KV heads of known models; two layers stand for all
    "llama-2-7b": (4096, 11008, 32, 32), "llama-3.1-8b": (4096, 14336, 32, 8), "qwen3-14b": (5120, 17408, 40, 8),
}  # fmt: skip


@pytest.mark.parametrize("target", [0.2, 0.35, 0.5])
@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("name", SERVED)
def test_uniform_counts_of_real_models_are_multiples_that_gpus_like(name, parallel, target):
    hidden, ffn, heads, kv_heads = SERVED[name]
    spec = read_spec(tiny_config("llama", hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads,
                                 num_key_value_heads=kv_heads, head_dim=128, num_hidden_layers=2))  # fmt: skip
    config = GateConfig(shape="uniform", units=["kv_groups", "ffn", "hidden"], tensor_parallel=parallel)
    check_target(spec, config, target)
    generator = torch.Generator().manual_seed(1)
    scores = {k: torch.rand(unit_shape(spec, k), generator=generator) for k in config.units}
    gates = select_units(spec, scores, target, "uniform", Rounding.of(config))
    groups, width = (int(count) for count in (gates.kv_groups[0].sum(), gates.ffn[0].sum()))
    assert (width % 128, int(gates.hidden.sum()) % 64) == (0, 0)
    assert groups % parallel == width % parallel == 0
    assert abs(sparsity_of(spec, gates) - target) <= 0.01


def test_a_tensor_parallel_size_that_the_model_cannot_have_is_one_line():
    with pytest.raises(UserError, match="tensor_parallel 4 does not divide the model's 2 KV groups: use one of 1, 2"):
        check_target(SPEC, GateConfig(units=["ffn"], tensor_parallel=4), 0.2)


def test_per_layer_selection_keeps_the_highest_scores_of_a_kind():
    scores = {"ffn": torch.randn(unit_shape(SPEC, "ffn")), "heads": torch.randn(unit_shape(SPEC, "heads"))}
    gates = select_units(SPEC, scores, 0.3, "per_layer").as_dict()
    for kind, s in scores.items():
        assert s[gates[kind] == 1].min() > s[gates[kind] == 0].max()
    assert sparsity_of(SPEC, Gates(**gates)) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("closed", [0.15, 0.3])
@pytest.mark.parametrize("shape", ["per_layer", "uniform"])
def test_among_equal_scores_some_leave_from_all_layers(closed, shape):
    """The paper's clamp leaves most log-alphas at ± log 100."""
    generator = torch.Generator().manual_seed(0)
    scores = {kind: torch.where(torch.rand(unit_shape(SPEC, kind), generator=generator) < closed, -4.6, 4.6)
              for kind in ("heads", "ffn")}  # fmt: skip
    chosen = select_units(SPEC, scores, 0.2, shape)
    assert sparsity_of(SPEC, chosen) == pytest.approx(0.2, abs=0.01)
    assert (chosen.as_dict()["ffn"] == 0).any(1).all()


def test_a_target_out_of_reach_is_refused_with_what_is_possible():
    with pytest.raises(UserError, match=r"out of reach: removing kv_groups takes away at most 0\.\d+"):
        check_target(SPEC, GateConfig(units=["kv_groups"]), 0.9)
    with pytest.raises(UserError, match=r"per_layer_ffn or per_layer .*; in the uniform shape gate `layers`"):
        check_target(SPEC, GateConfig(shape="uniform", units=["ffn", "ffn_sublayers"]), 0.2)
    with pytest.raises(UserError, match=r"so coarse in the uniform shape that the nearest reachable .* is 0\.\d+"):
        check_target(SPEC, GateConfig(shape="uniform", units=["kv_groups"]), 0.1)
    check_target(SPEC, GateConfig(shape="uniform", units=["kv_groups", "ffn"], ffn_multiple=1), 0.5)


@pytest.mark.parametrize("shape", ["uniform", "per_layer"])
@pytest.mark.parametrize("target", [0.1, 0.15, 0.236])
def test_hidden_alone_reaches_the_target_by_halving_the_multiple(target, shape):
    spec = read_spec(tiny_config("llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64))
    gates = select_units(spec, {"hidden": torch.randn(576)}, target, shape, Rounding(16, 16))
    assert sparsity_of(spec, gates) == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize("constraint", ["projection", "lagrangian"])
def test_schedule_rises_to_the_target_and_stays(constraint):
    settings = [f"sparsity.constraint={constraint}", "sparsity.target=0.4", "sparsity.warmup=0.5"]
    schedule = Schedule.of(load_config(None, ["train.steps=60", *settings]), 0)
    path = [schedule.target(step) for step in range(60)]
    assert schedule.warmup == 30
    assert path == sorted(path)
    assert path[29:] == [0.4] * 31
    assert 0 < path[0] < 0.4
    assert schedule.settle >= 30


def test_noise_falls_geometrically_until_the_gates_settle():
    config = load_config(None, ["train.steps=100", "gates.noise=0.5", "gates.settle=0.5"])
    path = [Schedule.of(config, 0).noise(step) for step in range(100)]
    assert path[0] == 0.5
    assert path[49] == pytest.approx(0.1)
    assert path[24] / path[23] == pytest.approx(path[10] / path[9])


@pytest.mark.parametrize(("kind", "shape"), [("kv_groups", "uniform"), ("attn_sublayers", "per_layer_ffn"),
                                             ("layers", "per_layer")])  # fmt: skip
@pytest.mark.parametrize("offset", [-2, 0, 2])
def test_the_hidden_size_makes_up_for_coarse_units_where_ffn_units_stay(kind, shape, offset):
    spec = read_spec(tiny_config("llama", hidden_size=240))
    for seed in range(4):
        torch.manual_seed(seed)
        scores = {kind: torch.randn(unit_shape(spec, kind)) + offset, "hidden": torch.randn(spec.hidden)}
        gates = select_units(spec, scores, 0.5, shape, Rounding(hidden=64))
        assert abs(sparsity_of(spec, gates) - 0.5) <= 0.01


@pytest.mark.parametrize("shape", ["per_layer_ffn", "per_layer"])
@pytest.mark.parametrize(("kind", "target"), [("layers", 0.2), ("ffn_sublayers", 0.15), ("attn_sublayers", 0.08)])
def test_a_coarse_unit_that_alone_removes_too_much_stays_where_ffn_units_meet_the_target(kind, target, shape):
    scores = {kind: torch.arange(SPEC.layers) - 9.0, "ffn": torch.randn(unit_shape(SPEC, "ffn"))}
    gates = select_units(SPEC, scores, target, shape)
    assert abs(sparsity_of(SPEC, gates) - target) <= 0.01
