"""The exported model computes what the masked model computes, in all families and shapes, and loads anywhere."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from exporting import (
    BIASED_LLAMA,
    EXPERTS,
    FAMILIES,
    FAMILY_SHAPES,
    LAYERS,
    SHAPES,
    VOCAB,
    assert_close,
    base_model,
    loaded,
    masked_logits,
    on_disk,
    random_lora,
    run_config,
    some_gates,
    some_ids,
    trained,
)  # fmt: skip
from safetensors.torch import load_file

from nuteprune.arch import PROJECTIONS, read_spec
from nuteprune.errors import UserError
from nuteprune.exporting import folding
from nuteprune.exporting.card import origin
from nuteprune.exporting.folding import exported_parameters, fold_model, plan_fold, small_config
from nuteprune.exporting.small import ExportError, exported_dtype
from nuteprune.exporting.targets import stock
from nuteprune.masks import Gates, Kept, Rounding, fit_shape, sparsity_of
from nuteprune.model.loading import read_base
from nuteprune.runs.checkpoint import verify
from nuteprune.runs.snapshot import Snapshot
from nuteprune.stages import export

pytestmark = pytest.mark.xdist_group("export")


@pytest.mark.parametrize(("family", "shape"), FAMILY_SHAPES)
def test_logits_equal_the_masked_model(exports, family, shape):
    directory, wanted, _ = exports[family, shape]
    for attention in ("sdpa", "eager"):
        with torch.no_grad():
            assert_close(loaded(directory, attn_implementation=attention)(some_ids()).logits, wanted)


@pytest.mark.parametrize(("family", "shape"), FAMILY_SHAPES)
def test_parameters_on_disk_are_those_the_gates_promise(exports, family, shape):
    directory, _, gates = exports[family, shape]
    spec = read_spec(base_model(family).config)
    tensors = load_file(directory / "model.safetensors")
    names = (*PROJECTIONS, "w1.", "w2.", "w3.")  # Mixtral's files have names of their own
    counted = sum(t.numel() for name, t in tensors.items() if any(p in name for p in names)
                  and not name.endswith(("o_proj.bias", "down_proj.bias")))  # fmt: skip
    assert 1 - counted / spec.prunable == pytest.approx(sparsity_of(spec, gates), abs=1e-9)
    record = json.loads((directory / "nuteprune.json").read_text())
    assert record["parameters"] == sum(t.numel() for t in tensors.values())
    experts = {"experts": spec.experts} if family in EXPERTS else {}
    assert record["original"] == {"heads": 6, "kv_heads": 3, "ffn": spec.ffn, "hidden": 48} | experts
    assert [len(u) for u in record["kept"]["ffn"]] == [int((z != 0).sum()) for z in gates.full(spec).ffn_gate(spec)]
    verify(directory)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "shape"), [pair for pair in FAMILY_SHAPES if pair[1] != "uniform"])
def test_per_layer_generates_with_cache_and_left_padding(exports, family, attention, shape):
    model = loaded(exports[family, shape][0], attn_implementation=attention)
    ids = some_ids(length=9)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(plain.logits))
    alone = model.generate(ids[1:, 4:], **{**options, "attention_mask": mask[1:, 4:]})
    assert_close(torch.stack(alone.logits)[:, 0], torch.stack(cached.logits)[:, 1])
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert_close(torch.stack(static.logits), torch.stack(plain.logits))


def test_per_layer_keeps_its_attention_when_it_is_changed_and_saved_again(exports, tmp_path):
    directory, wanted, _ = exports["llama", "per_layer"]
    model = loaded(directory)
    for implementation in ({"": "eager"}, "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            assert_close(model(some_ids()).logits, wanted)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert_close(loaded(tmp_path / "again")(some_ids()).logits, wanted)


@pytest.mark.parametrize(("family", "shape"), FAMILY_SHAPES)
@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_fold_is_exact(family, tied, fractional, shape):
    model = base_model(family, tied)
    spec, lora = read_spec(model.config), random_lora(model)
    gates = some_gates(spec, shape, fractional)
    wanted = masked_logits(base_model(family, tied), gates, lora, some_ids())
    fold = plan_fold(spec, gates, lora, 2.0)
    config = small_config(model.config, fold, shape)
    small = fold_model(model, config, fold)
    assert config.tie_word_embeddings == (tied and not fractional)
    assert exported_parameters(small) == round(spec.prunable * (1 - sparsity_of(spec, gates)))
    assert all(p.dtype == torch.float32 for p in small.parameters())
    again = folding.model_class(config)(config).eval()
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert_close(again(some_ids()).logits, wanted)


@pytest.mark.parametrize(("shape", "hidden"), [("uniform", 40), ("per_layer", 37)])
def test_llama_with_all_biases(shape, hidden):
    def gates_of(spec):
        return some_gates(spec, shape, hidden=hidden)

    model, same = base_model("llama", **BIASED_LLAMA), base_model("llama", **BIASED_LLAMA)
    spec, lora = read_spec(model.config), random_lora(model)
    wanted = masked_logits(same, gates_of(spec), lora, some_ids())
    fold = plan_fold(spec, gates_of(spec), lora, 2.0)
    config = small_config(model.config, fold, shape)
    small = folding.model_class(config)(config).eval()
    small.load_state_dict(fold_model(model, config, fold).state_dict())
    with torch.no_grad():
        assert_close(small(some_ids()).logits, wanted)


def without_layers(spec, shape: str, fractional: bool, hidden: int = 37) -> Gates:
    """`some_gates`, with two whole layers gone: one whose units are all there, and one that has none anyway."""
    gates = some_gates(spec, shape, fractional, hidden).as_dict()
    layers = torch.ones(spec.layers) if not fractional else torch.linspace(0.6, 0.9, spec.layers)
    layers[[1, 3]] = 0
    return Gates(**gates, layers=layers)


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize(
    ("family", "options", "shape"),
    [*((f, {}, s) for f, s in FAMILY_SHAPES), *(("llama", BIASED_LLAMA, s) for s in SHAPES)],
)
def test_removed_layers_are_deleted(family, options, fractional, shape):
    model, same = base_model(family, **options), base_model(family, **options)
    spec, lora = read_spec(model.config), random_lora(model)
    gates = without_layers(spec, shape, fractional, hidden=40 if options else 37)
    wanted = masked_logits(same, gates, lora, some_ids())
    fold = plan_fold(spec, gates, lora, 2.0)
    config = small_config(model.config, fold, shape)
    assert config.num_hidden_layers == 2
    if family == "qwen2":
        assert config.layer_types == ["full_attention", "sliding_attention"]
    small = fold_model(model, config, fold).eval()
    assert exported_parameters(small) == round(spec.prunable * (1 - sparsity_of(spec, gates)))
    again = folding.model_class(config)(config).eval()
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert_close(again(some_ids()).logits, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_with_fewer_layers_is_exported_loaded_and_described(tmp_path, shape):
    config, model, gates, lora = trained(
        tmp_path, "llama", lambda s: without_layers(s, shape, False), **{"gates.shape": shape}
    )
    directory = export.run(config)
    small = loaded(directory)
    assert len(small.model.layers) == small.config.num_hidden_layers == 2
    wanted = masked_logits(model, gates, lora, some_ids())
    with torch.no_grad():
        assert_close(small(some_ids()).logits, wanted)
        generated = small.generate(some_ids(), max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 23)
    assert "2 of 4 layers" in (directory / "README.md").read_text()
    assert json.loads((directory / "nuteprune.json").read_text())["kept"]["layers"] == [0, 2]


def test_a_student_without_any_layer_is_refused():
    spec = read_spec(base_model("llama").config)
    with pytest.raises(UserError, match="no decoder layer is left"):
        plan_fold(spec, Gates(layers=torch.zeros(LAYERS)), {}, 1.0)


def test_the_stock_class_and_the_base_settings_are_carried_over(exports):
    configs = {f: loaded(exports[f, "uniform"][0]).config for f in FAMILIES}
    llama, mistral = configs["llama"], configs["mistral"]
    assert llama.model_type == "mistral"  # LlamaConfig refuses 37 % 4
    assert llama.sliding_window is None
    assert llama.rope_parameters["rope_theta"] == 5000.0
    assert (llama.bos_token_id, llama.eos_token_id, llama.max_position_embeddings) == (1, 2, 128)
    assert mistral.sliding_window == 7
    assert [configs[f].model_type for f in FAMILIES[1:]] == list(FAMILIES[1:])
    assert (llama.hidden_size, llama.num_attention_heads, llama.num_key_value_heads) == (37, 4, 2)
    assert (llama.head_dim, llama.intermediate_size) == (8, 27)
    moe, mixtral = configs["qwen3_moe"], configs["mixtral"]
    assert (moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size) == (3, 2, 8)
    assert (mixtral.num_local_experts, mixtral.num_experts_per_tok, mixtral.intermediate_size) == (3, 2, 24)
    assert configs["qwen2"].layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2


def test_qwen2_that_stock_vllm_would_misread_is_said(tmp_path, caplog):
    """Its Qwen2 has no head size of its own: 4 heads of 8 in a hidden size of 40 would be heads of 10."""
    config, *_ = trained(tmp_path, "qwen2", lambda s: some_gates(s, "uniform", hidden=40))
    card = (export.run(config) / "README.md").read_text()
    (line,) = [r.getMessage() for r in caplog.records if "vLLM" in r.getMessage()]
    assert "hidden size / heads, 40 / 4 here and not 8" in line
    assert "--model-impl transformers" in line
    assert "`vllm serve PATH --model-impl transformers`" in card


def test_qwen2_that_stock_vllm_reads_is_silent(tmp_path, caplog):
    config, *_ = trained(tmp_path, "qwen2", lambda s: some_gates(s, "uniform", hidden=32))
    card = (export.run(config) / "README.md").read_text()
    assert "vLLM" not in caplog.text
    assert "`vllm serve PATH`" in card


def test_card_says_how_it_was_made(exports):
    card = (exports["qwen2", "uniform"][0] / "README.md").read_text()
    for part in ("license: apache-2.0", "target ", "from_pretrained(path)", "`text.txt`", "| 0 | 4 | 2 | 27 |",
                 "LoRA on the frozen base, distilled from the intact model, then folded"):  # fmt: skip
        assert part in card
    # The tokenizer needs it too: transformers reads the model's configuration to find the tokenizer's class.
    assert (exports["qwen2", "per_layer"][0] / "README.md").read_text().count("trust_remote_code=True") == 2


LICENCES = {
    "quoted": ('license: "apache-2.0"', ["license: apache-2.0"]),
    "listed": ("license: [mit, gemma]", ["license:", "- mit", "- gemma"]),
    "other": (
        "license: other\nlicense_name: qwen\nlicense_link: https://x/y",
        ["license: other", "license_name: qwen", "license_link: https://x/y"],
    ),
    "none": ("license: [", []),
}


@pytest.mark.parametrize(("entry", "lines"), LICENCES.values(), ids=LICENCES)
def test_card_keeps_the_licence_of_the_base(entry, lines, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"---\n{entry}\ntags: [x]\n---\n# Base\n")
    assert origin(str(tmp_path)) == lines


def test_low_precision_export_is_checked_before_the_cast(tmp_path, caplog, monkeypatch):
    config, model, gates, lora = trained(
        tmp_path,
        "llama",
        lambda s: some_gates(s, "uniform"),
        **{"export.dtype": "bfloat16"},
    )
    monkeypatch.setattr(stock, "SHARD", "20KB")
    with caplog.at_level("INFO", logger="nuteprune"):
        directory = export.run(config)
    shards = list(directory.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {t.dtype for s in shards for t in load_file(s).values()} == {torch.bfloat16}
    with torch.no_grad():
        assert_close(loaded(directory)(some_ids()).logits, masked_logits(model, gates, lora, some_ids()), 0.2)
    assert "cast to bfloat16" in caplog.text
    assert "after the cast to bfloat16" in (directory / "README.md").read_text()


def test_the_type_of_a_base_whose_configuration_names_none_is_that_of_its_weights(tmp_path):
    on_disk(tmp_path, base_model("llama").bfloat16())
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "dtype"}))
    assert exported_dtype(read_base(run_config(tmp_path).model), "as_base") == torch.bfloat16


def test_fewer_shards_after_the_cast_leave_no_stale_index(tmp_path, monkeypatch):
    config, *_ = trained(tmp_path, "llama", lambda s: some_gates(s, "uniform"), **{"export.dtype": "bfloat16"})
    whole = (export.run(config) / "model.safetensors").stat().st_size
    # Twice the bytes in float32, which is saved and checked first, need two files; in bfloat16 one is enough.
    monkeypatch.setattr(stock, "SHARD", f"{whole // 1000 + 1}KB")
    directory = export.run(config)
    assert [p.name for p in directory.glob("model*")] == ["model.safetensors"]


def test_weights_that_overflow_float16_are_refused(tmp_path):
    base = base_model("llama")
    base.model.layers[0].mlp.down_proj.weight.data.mul_(1e6)
    config, *_ = trained(tmp_path, "llama", lambda s: some_gates(s, "uniform"), base=base,
                         **{"export.dtype": "float16"})  # fmt: skip
    with pytest.raises(ExportError, match=r"export\.dtype=bfloat16"):
        export.run(config)


def test_untied_head_is_reported(tmp_path, caplog):
    config, *_ = trained(tmp_path, "llama", lambda s: some_gates(s, "uniform"), base=base_model("llama", tied=True))
    directory = export.run(config)
    assert f"adds {VOCAB * 37:,} parameters" in caplog.text
    assert "untying" in (directory / "README.md").read_text()


def test_refuses_when_logits_differ_and_leaves_nothing(tmp_path, monkeypatch):
    config, *_ = trained(tmp_path, "llama", lambda s: some_gates(s, "uniform"))
    honest = folding.fold_layer

    def corrupt(fold, layer, index):
        state = honest(fold, layer, index)
        if index == 2:
            state["mlp.up_proj.weight"][0, 0] += 3.0
        return state

    monkeypatch.setattr(folding, "fold_layer", corrupt)
    with pytest.raises(ExportError, match="logits differ"):
        export.run(config)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["pruned"]


def test_ladder_rung_is_exported_from_the_same_run(tmp_path):
    def rung(zeros):
        def make(spec, lora):
            gates = {"kv_groups": torch.ones(LAYERS, 3), "ffn": torch.ones(LAYERS, 40)}
            gates["ffn"][:, :zeros] = 0
            gates["ffn"][:, zeros : zeros + 2] = 0.5  # on their way out
            scores = {k: z + torch.linspace(0, 0.1, z.numel()).view_as(z) for k, z in gates.items()}
            half = {k: tuple(t.bfloat16() for t in pair) for k, pair in lora.items()}
            return Snapshot(zeros, sparsity_of(spec, Gates(**gates)), Gates(**gates), scores, half)

        return make

    def final(spec):
        return rung(24)(spec, {}).gates.opened()

    config, model, _, lora = trained(tmp_path, "mistral", final, [rung(4), rung(12)])
    spec = read_spec(model.config)
    wanted = rung(12)(spec, lora)
    config = replace(config, export=replace(config.export, sparsity=round(wanted.sparsity, 2)))
    small = loaded(export.run(config))
    assert small.config.intermediate_size == 28
    with torch.no_grad():
        share = (wanted.sparsity / sparsity_of(spec, final(spec))) ** 0.5
        learned = {key: (a, share * b) for key, (a, b) in lora.items()}
        assert_close(small(some_ids()).logits, masked_logits(model, wanted.gates.opened(), learned, some_ids()))
    config = replace(config, export=replace(config.export, sparsity=0.9))
    with pytest.raises(UserError, match=r"the run never got there; it has 0\.\d+, 0\.\d+, 0\.\d+"):
        export.run(config)


def test_structure_is_chosen_anew_where_the_shape_differs(tmp_path, caplog):
    def ragged(spec):
        return some_gates(spec, "per_layer", empty=False)

    config, model, gates, _ = trained(
        tmp_path, "qwen2", ragged, **{"gates.shape": "per_layer", "export.shape": "uniform"}
    )
    with caplog.at_level("INFO", logger="nuteprune"):
        small = loaded(export.run(config))
    assert "units change to fit the uniform shape" in caplog.text
    spec = read_spec(model.config)
    assert abs(1 - exported_parameters(small) / spec.prunable - config.sparsity.target) <= 0.01
    kept = json.loads((tmp_path / "run" / "export" / "nuteprune.json").read_text())["kept"]
    hidden = gates.hidden[kept["hidden"]]
    assert ((hidden != 0) & (hidden != 1)).any()  # units that were there keep their fractional gate


def test_run_that_missed_its_target_is_cut_to_it():
    spec = read_spec(base_model("llama").config)
    gates = some_gates(spec, "uniform")
    scores = {k: torch.rand(z.shape) for k, z in gates.as_dict().items()}
    chosen = fit_shape(spec, gates, scores, 0.3, "uniform", Rounding())
    assert abs(sparsity_of(spec, chosen) - 0.3) <= 0.01
    assert Kept.of(spec, chosen).is_uniform
    before, after = gates.full(spec).ffn_gate(spec), chosen.full(spec).ffn_gate(spec)
    stayed = (before != 0) & (after != 0)
    assert torch.equal(before[stayed], after[stayed])
    assert (after[(before == 0) & (after != 0)] == 1).all()
    split = fit_shape(spec, gates, scores, 0.3, "uniform", Rounding(parallel=3))
    assert len(Kept.of(spec, split).kv_groups[0]) == 3
    assert len(Kept.of(spec, split).ffn[0]) % 3 == 0
    same = fit_shape(spec, gates, scores, sparsity_of(spec, gates), "uniform", Rounding(16, 16))
    assert same is gates


def test_free_ffn_widths_of_a_per_layer_run_are_rounded():
    spec = read_spec(base_model("llama", intermediate_size=160).config)
    generator = torch.Generator().manual_seed(0)
    scores = {"ffn": torch.rand(LAYERS, 160, generator=generator)}
    gates = Gates(ffn=(scores["ffn"] > 0.5).float())
    target = sparsity_of(spec, gates)
    chosen = fit_shape(spec, gates, scores, target, "per_layer_ffn", Rounding(8))
    assert {len(units) % 8 for units in Kept.of(spec, chosen).ffn} == {0}
    assert abs(sparsity_of(spec, chosen) - target) <= 0.01
    assert fit_shape(spec, chosen, scores, target, "per_layer_ffn", Rounding(8)) is chosen
    assert fit_shape(spec, gates, scores, target, "per_layer", Rounding(8)) is gates


def test_target_that_the_shape_cannot_meet():
    spec = read_spec(base_model("llama").config)
    gates = Gates(kv_groups=torch.ones(LAYERS, 3))
    with pytest.raises(UserError, match=r"the uniform shape reaches sparsity 0\.000 instead of 0\.07"):
        fit_shape(spec, gates, {"kv_groups": torch.rand(LAYERS, 3)}, 0.07, "uniform", Rounding(16, 16))


def test_removed_sublayers_need_the_per_layer_shape(tmp_path):
    config, *_ = trained(tmp_path, "llama", lambda s: some_gates(s, "per_layer"),
                         **{"gates.shape": "per_layer", "export.shape": "uniform"})  # fmt: skip
    with pytest.raises(UserError, match=r"use export\.shape=per_layer_ffn or per_layer"):
        export.run(config)


def test_output_directory_is_only_replaced_if_it_is_ours(tmp_path):
    config, *_ = trained(tmp_path, "llama", lambda s: some_gates(s, "uniform"))
    directory = export.run(config)
    assert export.run(config) == directory
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    distilled = directory.parent / "distill/model"
    shutil.copytree(directory, distilled)
    for output, message in (("mine", "not an earlier export"), ("base", "the base model"), ("text.txt", "is a file"),
                            (distilled, "the place of the distilled model")):  # fmt: skip
        elsewhere = replace(config, export=replace(config.export, output=str(tmp_path / output)))
        with pytest.raises(UserError, match=message):
            export.run(elsewhere)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_run_directory_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no finished prune run"):
        export.run(run_config(tmp_path))
