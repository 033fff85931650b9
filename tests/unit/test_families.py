"""What a family cannot lose is one line before a run starts; fused projections are split and packed unchanged."""

import pytest
import torch
from tiny import CONFIGS, tiny_config, tiny_model
from torch import nn

from nuteprune.__main__ import main
from nuteprune.arch import FAMILIES, fuse, projections, read_spec, split_fused, stored
from nuteprune.config import GateConfig, LoraConfig, LossConfig, ModelConfig
from nuteprune.errors import UserError
from nuteprune.evaluation.models import load_any
from nuteprune.exporting.folding import fold_model, plan_fold, small_config
from nuteprune.exporting.gguf_families import ARCHITECTURES
from nuteprune.exporting.gguf_model import gguf_architecture
from nuteprune.exporting.small import exported_dtype
from nuteprune.masks import Gates, Kept, MaskSet, Rounding, check_target, select_units, sparsity_of, unit_shape
from nuteprune.model.layers import build_view
from nuteprune.model.loading import read_base
from nuteprune.model.pairing import PairedModel

LONG = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 2.0],
                            "long_factor": [1.0, 2.0], "original_max_position_embeddings": 64}}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "units", "shape", "line"),
    [
        ("llama", {}, ["experts"], "uniform", "gates.units: llama cannot have experts, leave it out"),
        ("mixtral", {}, ["ffn", "ffn_sublayers"], "per_layer_ffn", "gates.units: mixtral cannot have ffn_sublayers"),
        ("qwen3_moe", {}, ["ffn_sublayers"], "uniform", "gates.units: qwen3_moe cannot have ffn_sublayers"),
        ("phi3", LONG, ["kv_groups"], "uniform", "gates.units: phi3 cannot have kv_groups"),
        ("phi3", LONG, ["ffn"], "per_layer_ffn", "gates.shape: phi3 cannot have per_layer_ffn"),
        ("phi3-partial", {}, ["ffn"], "per_layer", "gates.shape: phi3 cannot have per_layer"),
    ],
)
def test_what_a_family_cannot_lose_is_one_line(tmp_path, capsys, name, changes, units, shape, line):
    config = tiny_config(name, hidden_size=24, num_attention_heads=6, head_dim=4, **changes)
    gates = GateConfig(units=units, shape=shape)
    with pytest.raises(UserError, match=line):
        check_target(read_spec(config), gates, 0.2)
    config.save_pretrained(tmp_path)
    arguments = [f"gates.units=[{','.join(units)}]", f"gates.shape={shape}", "--dry-run", "--world-size", "1"]
    assert main(["prune", f"model.path={tmp_path}", f"run_dir={tmp_path / 'run'}", *arguments]) == 2
    printed = capsys.readouterr().err
    assert line in printed
    assert len(printed.splitlines()) == 1


def test_a_refused_shape_is_refused_by_the_export_too():
    config = tiny_config("phi3-partial")
    spec = read_spec(config)
    fold = plan_fold(spec, Gates(ffn=torch.ones(spec.layers, spec.ffn)), {}, 1.0)
    assert small_config(config, fold, "uniform").intermediate_size == spec.ffn
    with pytest.raises(UserError, match=r"export.shape: phi3 cannot have per_layer"):
        small_config(config, fold, "per_layer")


@torch.no_grad()
@pytest.mark.parametrize(("name", "changes", "kind"), [("phi3", LONG, "ffn"), ("phi3-partial", {}, "kv_groups")])
def test_rotary_positions_of_its_own_stay_exact_in_the_stock_class(name, changes, kind):
    model, same = (tiny_model(name, hidden_size=24, head_dim=4, **changes) for _ in range(2))
    spec, ids = read_spec(model.config), torch.arange(90)[None]  # beyond the original context
    removed = torch.ones(unit_shape(spec, kind))
    removed[:, 1] = 0
    gates = Gates(**{kind: removed})
    paired = PairedModel(same, spec, LoraConfig())
    wanted = paired.logits(ids, build_view(spec, gates, {}, 1.0, torch.float32))
    fold = plan_fold(spec, gates, {}, 1.0)
    config = small_config(model.config, fold, "uniform")
    small = type(model)(config).eval()
    small.load_state_dict(fold_model(model, config, fold).state_dict())
    torch.testing.assert_close(small(ids).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CONFIGS if tiny_config(name).model_type in ARCHITECTURES])
def test_no_gguf_of_unequal_layers_where_llama_cpp_holds_none(name):
    config = tiny_config(name)
    with pytest.raises(UserError, match="only where all layers are alike"):
        gguf_architecture(read_spec(config), "per_layer_ffn", config)


@pytest.mark.parametrize(("name", "changes", "lack"), [
    ("olmo2", {}, "no heads narrower than the hidden size"),
    ("smollm3", {}, "no layers without rotary positions but every 4th"),
    ("smollm3", {"no_rope_layer_interval": 4, "mlp_bias": True}, "no biases in the FFN"),
    ("phi3-partial", {}, "no heads that rotate only in part"),
    ("olmo3", {"attention_bias": True, "num_attention_heads": 4}, "no bias on o_proj"),
    ("gemma3", {"num_hidden_layers": 62}, "no scale of attention"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
])  # fmt: skip
def test_no_gguf_of_what_llama_cpp_would_get_wrong(name, changes, lack):
    config = tiny_config(name, **changes)
    with pytest.raises(UserError, match=f"llama.cpp's {config.model_type} has .*{lack}"):
        gguf_architecture(read_spec(config), "uniform", config)


def test_experts_without_lora_are_one_line(tmp_path, capsys):
    tiny_config("mixtral").save_pretrained(tmp_path)
    arguments = [f"model.path={tmp_path}", f"run_dir={tmp_path / 'run'}", "gates.shape=uniform"]
    assert main(["prune", *arguments, "--dry-run", "--world-size", "1"]) == 2
    line = "lora.targets: mixtral cannot have gate_proj, up_proj, down_proj, leave them out"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_qwen3_moe_with_dense_layers_is_refused(changes):
    with pytest.raises(UserError, match="dense layers"):
        read_spec(tiny_config("qwen3_moe", **changes))


@pytest.mark.parametrize("dry", [[], ["--dry-run", "--world-size", "1"]])
def test_gemma_in_float16_is_one_line(tmp_path, capsys, dry, text_file, tokenizer):
    tiny_model("gemma3").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    arguments = [f"model.path={tmp_path / 'base'}", f"run_dir={tmp_path / 'run'}", "model.dtype=float16",
                 f"data.source={text_file}", "data.seq_len=32"]  # fmt: skip
    assert main(["prune", *arguments, *dry]) == 2
    assert "nothing trains in float16" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"model.dtype: gemma3_text cannot have float16"):
        load_any(str(tmp_path / "base"), ModelConfig(dtype="float16"))
    with pytest.raises(UserError, match=r"export.dtype: gemma3_text cannot have float16"):
        exported_dtype(read_base(ModelConfig(path=str(tmp_path / "base"))), "float16")


def test_an_export_of_gemma_in_float16_is_one_line(exported):
    run = exported("gemma3", 0.4)
    with pytest.raises(UserError, match=r"model.dtype: gemma3_text cannot have float16"):
        load_any(str(run / "export"), ModelConfig(dtype="float16"))


def test_gemma_with_softcapped_logits_is_refused():
    with pytest.raises(UserError, match="final_logit_softcapping"):
        read_spec(tiny_config("gemma3", final_logit_softcapping=30.0))


@pytest.mark.parametrize("target", [0.15, 0.3, 0.5])
def test_heads_divide_the_hidden_size_where_the_stock_class_wants_it(target):
    spec = read_spec(tiny_config("gemma3", hidden_size=48, intermediate_size=64))
    config = GateConfig(
        units=["heads", "kv_groups", "ffn", "hidden"], shape="uniform", ffn_multiple=1, hidden_multiple=4
    )
    check_target(spec, config, target)
    torch.manual_seed(0)
    scores = {kind: torch.randn(unit_shape(spec, kind)) for kind in config.units}
    gates = select_units(spec, scores, target, "uniform", Rounding(hidden=4))
    kept = Kept.of(spec, gates)
    assert kept.is_uniform
    assert len(kept.hidden) % len(kept.heads[0]) == 0
    assert abs(sparsity_of(spec, gates) - target) <= 0.01


@pytest.mark.parametrize("shape", ["uniform", "per_layer_ffn"])
@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_a_hidden_size_that_the_heads_divide_is_found_beside_any_multiple(shape, multiple):
    spec = read_spec(tiny_config("llama-bias", hidden_size=72, intermediate_size=96))
    for seed in range(6):
        torch.manual_seed(seed)
        scores = {kind: torch.randn(unit_shape(spec, kind)) for kind in ("ffn", "hidden")}
        gates = select_units(spec, scores, 0.3, shape, Rounding(hidden=multiple))
        assert abs(sparsity_of(spec, gates) - 0.3) <= 0.01
        assert shape != "uniform" or len(Kept.of(spec, gates).hidden) % spec.heads == 0


def test_the_only_kv_group_of_a_layer_has_no_gate():
    spec = read_spec(tiny_config("gemma3", num_key_value_heads=1))
    assert MaskSet(spec, GateConfig(units=["heads", "kv_groups", "ffn"])).kinds == ["heads", "ffn"]


@pytest.mark.parametrize("name", ["olmo2", "gemma3"])
@pytest.mark.parametrize("kind", ["attn_sublayers", "ffn_sublayers", "layers"])
def test_the_gate_of_a_sublayer_under_a_norm_is_felt(name, kind):
    """Before the norm it would scale away."""
    hf = tiny_model(name)
    spec = read_spec(hf.config)
    model = PairedModel(hf, spec, LoraConfig())
    ids = torch.arange(20)[None]
    gate = torch.ones(unit_shape(spec, kind), requires_grad=True)
    view = build_view(spec, Gates(**{kind: gate}), {}, 1.0, torch.float32)
    model(ids, view, None, LossConfig()).total.backward()
    assert (gate.grad.abs() > 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["olmo2", "gemma3"])
def test_half_a_gate_is_half_of_what_the_sublayer_adds(name):
    hf = tiny_model(name)
    spec = read_spec(hf.config)
    model, seen = PairedModel(hf, spec, LoraConfig()), []
    model.layers[0].layer.register_forward_hook(lambda module, args, output: seen.append(output))
    for value in (1.0, 0.5, 0.0):
        gates = Gates(ffn_sublayers=torch.full((spec.layers,), value))
        model.hidden(torch.arange(20)[None], build_view(spec, gates, {}, 1.0, torch.float32))
    torch.testing.assert_close(seen[1], (seen[0] + seen[2]) / 2)


def test_every_family_has_a_tiny_model():
    assert {tiny_config(name).model_type for name in CONFIGS} == {*FAMILIES}


@pytest.mark.parametrize("name", CONFIGS)
def test_split_layers_know_their_files_and_pack_again(name):
    layer = tiny_model(name).model.layers[1]
    whole = layer.state_dict()
    before = whole | unstacked(whole)
    split_fused(layer)
    for key, parameter in layer.named_parameters():
        own, rows = stored(layer, key)
        assert torch.equal(before[own][rows], parameter)
        assert before[own].data_ptr() == parameter.data_ptr() or rows.start  # a view, not a copy
    single = {}
    for projection, (owner, attribute) in projections(layer).items():
        block = "self_attn" if projection[0] in "qkvo" else "mlp"
        linear = getattr(owner, attribute)
        assert isinstance(linear, nn.Linear)
        single |= {f"{block}.{projection}.{part}": tensor for part, tensor in linear.named_parameters()}
    packed = fuse(single, tiny_model(name).model.layers[1])
    kept = {k: v.shape for k, v in whole.items() if "norm" not in k and k != "mlp.gate.weight"}
    assert kept == {k: v.shape for k, v in packed.items()}
    assert all(torch.equal(whole[k], v) for k, v in packed.items())


def unstacked(state):
    """The experts of a layer one by one, as files have them."""
    if "mlp.experts.gate_up_proj" not in state:
        return {}
    found = {}
    for number, (both, down) in enumerate(zip(state["mlp.experts.gate_up_proj"], state["mlp.experts.down_proj"],
                                              strict=True)):  # fmt: skip
        names = zip(("gate", "up", "down"), (*both.chunk(2), down), strict=True)
        found |= {f"mlp.experts.{number}.{name}_proj.weight": weight for name, weight in names}
    return found
