"""The planner: exact counts, hand-computed sizes, what moves which way, files that load again, one line per mistake."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from tiny import CONFIGS, tiny_config, tiny_model

from nuteprune.__main__ import main
from nuteprune.arch import projections, read_spec
from nuteprune.config import load_config
from nuteprune.masks import MaskSet
from nuteprune.model.layers import build_view
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.distributed import World
from nuteprune.parallel.zero import zero_settings
from nuteprune.planning.costs import (
    LAUNCH_SECONDS,
    extra_steps,
    mean_kept,
    over_links,
    step_flops,
    timing,
    total_steps,
    traffic,
)
from nuteprune.planning.footprint import (
    Cluster,
    Job,
    Layout,
    activations,
    gate_units,
    layer_tensors,
    logits_chunk,
    lora_parameters,
    memory,
    saved_per_token,
    snapshot_bytes,
    snapshots,
    total_parameters,
)
from nuteprune.planning.planner import MODELS, candidates, make_plan, named_spec, quantity, table
from nuteprune.training.teachers import TeacherBank

TOTALS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_248_023_552,
    "qwen3-14b": 14_768_307_200,
    "granite-3.3-8b": 8_170_864_640,
    "smollm3-3b": 3_075_098_624,
    "phi-4": 14_659_507_200,
    "olmo-2-7b": 7_298_617_344,
    "gemma-3-1b": 999_885_952,
    "olmo-3-7b": 7_298_011_136,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
}
GPU = Cluster(1, 8, 80e9, 450e9, 50e9, 50e9, 990e12, 0.4)


def job(model="llama-7b", nodes=1, gpus=8, *overrides, gpu_memory=80e9):
    config = load_config(None, ["model.dtype=bfloat16", f"train.batch_size={nodes * gpus}", *overrides])
    spec = named_spec(model) if isinstance(model, str) else model
    return Job(spec, config, replace(GPU, nodes=nodes, gpus_per_node=gpus, gpu_memory=gpu_memory))


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_totals_of_public_models(name):
    assert total_parameters(named_spec(name)) == TOTALS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_of_real_models(name):
    model = tiny_model(name)
    spec = read_spec(model.config)
    assert total_parameters(spec) == sum(p.numel() for p in model.parameters())
    projections(model.model.layers[0])  # splits those that the family fuses
    assert sorted(layer_tensors(spec)) == sorted(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("units", ["[kv_groups,ffn]", "[heads,ffn,hidden]"])
def test_lora_gates_and_teachers_are_those_of_a_run(units):
    model = tiny_model("llama")
    spec = read_spec(model.config)
    plan = job(spec, 1, 1, f"gates.units={units}", "gates.shape=per_layer")
    paired, masks = PairedModel(model, spec, plan.config.lora), MaskSet(spec, plan.config.gates)
    assert lora_parameters(plan) == sum(t.numel() for pair in paired.lora().values() for t in pair)
    assert gate_units(plan) == sum(p.numel() for p in masks.parameters())
    bank = TeacherBank(spec, plan.config.teacher, 1.0, torch.device("cpu"), torch.float32)
    bank.record(0, 0.05, masks.deterministic(), masks.scores(), paired.lora())
    assert snapshot_bytes(plan) == bank.nbytes


def test_passes_outside_the_steps():
    """Importance on 16 batches; 12 structures on 4 batches at a quarter of a step, where there are several."""
    tokens = "gates.importance_tokens=131072"
    for overrides, steps in (
        (["gates.shape=per_layer_ffn"], 16), (["gates.shape=uniform", "gates.units=[kv_groups,ffn]"], 28),
        (["gates.shape=uniform", "gates.units=[ffn]"], 16), (["gates.shape=uniform", "gates.units=[ffn,layers]"], 28),
        (["gates.shape=per_layer_ffn", "gates.units=[ffn,layers]"], 16), (["gates.shape=per_layer"], 16),
        (["gates.init=drop_rate", "gates.settle=1", "gates.shape=per_layer"], 0),
    ):  # fmt: skip
        assert extra_steps(load_config(None, [tokens, *overrides])) == steps


def test_snapshots():
    config = job().config
    assert snapshots(config, 1000) == 20
    assert snapshots(config, 10) == 4  # one a step of the warm-up
    assert snapshots(replace(config, teacher=replace(config.teacher, mode="intact")), 1000) == 0


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_by_hand():
    """LLaMA-7B, bf16, 8 ranks: 1/8 of the matrices, norms whole; LoRA of 16·(4·(D+D) + 3·(D+F)), frozen 112·(D+F)."""
    plan = job()
    need = memory(plan, Layout(3, 1), 1000)
    norms = 65 * 4096
    assert need.resident["frozen weights (1/8)"] == 2 * (TOTALS["llama-7b"] - norms) / 8
    assert need.resident["small tensors kept whole"] == 2 * norms
    assert lora_parameters(plan) == 32 * 16 * (4 * 8192 + 3 * 15104) == 39_976_960
    frozen = need.resident["frozen ranks in compute type (student, teachers)"]
    assert frozen == (2 + 4) * 32 * 112 * 15104
    assert need.resident["LoRA weights"] == 4 * 39_976_960
    assert need.resident["LoRA gradient"] == 4 * 39_976_960
    assert need.resident["LoRA moments"] == 8 * 39_976_960 / 8
    assert need.layer_phase["gathered layers (3: at work, prefetched, its buffer)"] == 3 * 2 * (
        4 * 4096**2 + 3 * 4096 * 11008 + 8192
    )
    assert need.head_phase["gathered head"] == 2 * 32000 * 4096
    assert need.head_phase["logits of one KL chunk"] == logits_chunk(plan, 512) == 4 * 4 * 256 * 32000
    assert need.resident["gates and their optimizer"] == 12 * 32 * (11008 + 1)  # FFN units and attention
    assert need.host == {
        "teachers (20 snapshots)": 20 * (2 * 39_976_960 + 8 * 32 * (11008 + 1)),
        "refit of removed units": 4 * 11008**2 * 4,
    }


def test_zero2_keeps_weights_whole_and_offload_and_hpz_move_them():
    plan = job("llama-3.1-70b", 4)
    whole = memory(plan, Layout(2, 1), 100)
    assert whole.resident["frozen weights (whole)"] == 2 * TOTALS["llama-3.1-70b"]
    assert whole.layer_phase["gathered layers (3: at work, prefetched, its buffer)"] == 0
    plain, off, hpz = (memory(plan, Layout(3, 1, **kw), 100) for kw in ({}, {"offload": True}, {"hpz": True}))
    shard = plain.resident["frozen weights (1/32)"]
    assert off.host["offloaded weights"] == shard == plain.peak - off.peak
    assert hpz.peak - plain.peak == 4 * shard


@pytest.mark.parametrize(
    "layout", [Layout(3, 1), Layout(3, 1, True), Layout(3, 1, offload=True), Layout(3, 1, hpz=True)]
)
def test_more_nodes_take_less_memory(layout):
    peaks = [memory(job("llama-3.1-70b", nodes), layout, 100).peak for nodes in (1, 2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4


def test_checkpointing_and_micro_batch_take_less_memory():
    plan = job("llama-7b", 1, 8, "train.batch_size=64")
    large, small = memory(plan, Layout(3, 8), 100).peak, memory(plan, Layout(3, 4), 100).peak
    assert memory(plan, Layout(3, 8, True), 100).peak < small < large


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_activations_are_what_autograd_saves(name, checkpointing, dtype):
    """Bytes of distinct tensors that one paired forward saves, held within 10% of the count."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 8,
        "head_dim": 8,
        "num_hidden_layers": 6,
    }
    model = tiny_model(name, **sizes).to(getattr(torch, dtype))
    spec = read_spec(model.config)
    plan = job(spec, 1, 1, f"model.dtype={dtype}", "data.seq_len=64")
    paired, masks = PairedModel(model, spec, plan.config.lora, checkpointing), MaskSet(spec, plan.config.gates)
    gates = masks.sample(torch.Generator().manual_seed(0))
    student = build_view(spec, gates, paired.lora(), paired.scaling, paired.dtype)
    teacher = build_view(spec, None, {}, paired.scaling, paired.dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens, saved = 4 * 64, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.nbytes() > 8 * tokens:  # not LoRA, gates, indices
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        paired(torch.randint(0, 300, (4, 64)), student, teacher, plan.config.loss)
    final = memory(plan, Layout(3, 4), 100).head_phase
    counted = activations(plan, checkpointing) * tokens + final["final hidden states and their gradient"]
    assert counted == pytest.approx(sum(size for size, _ in saved.values()), rel=0.1)


def test_eager_attention_keeps_probabilities():
    eager = saved_per_token(job("llama-3.1-8b", 1, 8, "model.attention=eager"))
    assert eager - saved_per_token(job("llama-3.1-8b")) == 32 * 512 * 6 + 2 * 2 * (4096 - 1024)


# ---- traffic ---------------------------------------------------------------------------------------------------------


def test_paired_gathers_layers_twice_and_separate_thrice():
    plan = job("llama-7b", 2)
    layers = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    vocabulary = 2 * 32000 * 4096
    assert traffic(plan, Layout(3, 1)).gathered == 2 * layers + 2 * vocabulary
    assert traffic(plan, Layout(3, 1), "separate").gathered == 3 * layers + 4 * vocabulary
    assert traffic(plan, Layout(3, 1)).ratio == pytest.approx(2.0, abs=0.05)
    assert traffic(plan, Layout(3, 1), "separate").ratio == pytest.approx(3.0, abs=0.05)
    assert traffic(plan, Layout(2, 1)).gathered == 0


def test_each_micro_batch_gathers_anew():
    plan = job("llama-7b", 1, 8, "train.batch_size=32")
    one, four = traffic(plan, Layout(3, 4)), traffic(plan, Layout(3, 1))
    assert four.gathered == 4 * one.gathered


def test_links_by_hand():
    two = replace(GPU, nodes=2, gpus_per_node=4)
    assert over_links(800.0, two) == (700 * 3 / 4, 700 / 4)  # (n-1)/n of 800, a quarter of it by the NIC
    assert over_links(800.0, two, inside=True) == (600, 0)
    assert over_links(800.0, replace(two, nodes=1)) == (600, 0)
    assert over_links(800.0, replace(two, gpus_per_node=1)) == (0, 400)
    assert over_links(800.0, replace(two, nodes=1, gpus_per_node=1)) == (0, 0)


def test_hpz_keeps_weights_inside_the_node_and_offload_reads_shards():
    plan = job("llama-3.1-70b", 4)
    plain, hpz, off = (traffic(plan, Layout(3, 1, **kw)) for kw in ({}, {"hpz": True}, {"offload": True}))
    assert plain.inter == pytest.approx(plain.gathered * 31 / 32 / 8)
    assert (hpz.inter, hpz.intra) == (0, plain.gathered * 7 / 8)
    assert off.host == plain.gathered / 32


# ---- time ------------------------------------------------------------------------------------------------------------


def test_flops_by_hand():
    plan = job("llama-7b", 1, 8, "teacher.mode=none")
    spec, tokens = plan.spec, 8 * 512
    attention, lora, head = 32 * 2 * 512 * 4096, 2 * lora_parameters(plan), 2 * 32000 * 4096
    assert step_flops(plan, False, (1.0, 1.0)) == tokens * (4 * spec.prunable + 3.5 * attention + 3 * lora + 2 * head)
    again = step_flops(plan, True, (1.0, 1.0)) - step_flops(plan, False, (1.0, 1.0))
    assert again == tokens * (2 * spec.prunable + attention + lora)
    half = step_flops(plan, False, (0.5, 1.0)) - tokens * 2 * head
    assert half == (step_flops(plan, False, (1.0, 1.0)) - tokens * 2 * head) / 2


def test_gathers_hide_behind_compute():
    plan = job("llama-7b", 2)
    t = timing(plan, Layout(3, 1), (1.0, 1.0))
    assert t.step == max(t.compute, t.gather, t.launch) + t.reduce
    assert t.launch == 32 * LAUNCH_SECONDS  # one micro-batch
    assert timing(plan, Layout(3, 1, True), (1.0, 1.0)).launch == pytest.approx(t.launch * 4 / 3)
    moved = traffic(plan, Layout(3, 1))
    assert t.gather == max(moved.intra / 450e9, moved.inter / 50e9)


def test_offloaded_weights_are_waited_for():
    plan = job("llama-7b", 2)
    plain, off = (timing(plan, Layout(3, 1, offload=offload), (1.0, 1.0)) for offload in (False, True))
    assert plain.offload == 0
    assert off.step == pytest.approx(plain.step + traffic(plan, Layout(3, 1, offload=True)).host / 50e9)


def test_kept_shares_follow_schedule_and_teachers():
    plan = job("llama-7b", 1, 8, "sparsity.schedule=linear", "sparsity.warmup=0.5", "sparsity.target=0.4")
    student, teacher = mean_kept(plan, 1000)
    assert student == pytest.approx(1 - (0.5 * 0.2 + 0.5 * 0.4), abs=1e-3)
    assert student < teacher < 1
    assert mean_kept(job("llama-7b", 1, 8, "teacher.mode=intact"), 100)[1] == 1.0


def test_steps_of_the_paper():
    config = load_config(None, ["recipe=paper"])
    assert total_steps(config, 427) == round(7 * (20_000 * 427 // 512) / 16) == 7297


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_a_small_model_stays_whole_and_a_large_one_is_partitioned():
    assert make_plan(job("llama-7b"), 427).chosen.layout == Layout(2, 1)
    plan = make_plan(job("llama-3.1-70b", 4), 427)
    assert plan.chosen.layout == Layout(3, 1, hpz=True)
    assert [option.fits for option in plan.tried] == [False, True]


def test_preference_is_offload_then_micro_batch_then_checkpointing():
    order = list(candidates(job("llama-7b", 1, 8, "train.batch_size=16"), "3"))
    assert order == [
        Layout(3, micro, checkpointing, offload)
        for checkpointing in (False, True)
        for micro in (2, 1)
        for offload in (False, True)
    ]


@pytest.mark.parametrize("batch", [8, 64, 256])
@pytest.mark.parametrize("gpu_memory", [16e9, 24e9, 40e9, 80e9])
def test_the_first_that_fits_is_chosen(gpu_memory, batch):
    plan = make_plan(job("llama-13b", 1, 8, f"train.batch_size={batch}", gpu_memory=gpu_memory), 427)
    assert [option.fits for option in plan.tried[:-1]] == [False] * (len(plan.tried) - 1)
    if plan.chosen.fits:
        assert plan.chosen.memory.peak <= 0.9 * gpu_memory
        assert plan.fastest is None or plan.fastest.timing.step < plan.chosen.timing.step


def test_where_nothing_fits_the_smallest_is_shown():
    plan = make_plan(job("llama-3.1-70b", 1, 8, gpu_memory=4e9), 427)
    assert not plan.chosen.fits
    assert plan.chosen.layout == Layout(3, 1, True, True)


def test_the_table_has_every_model():
    rows = table(load_config(None), GPU, 427)
    assert [name for name, _ in rows] == list(MODELS)
    assert all(plan.job.config.train.batch_size == 16 for _, plan in rows)


# ---- the command -----------------------------------------------------------------------------------------------------


def config_file(tmp_path, **changes):
    tiny_config("llama", **changes).save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_command_writes_settings_that_load(tmp_path, capsys):
    out = tmp_path / "plan"
    flags = ["plan", "--model", str(config_file(tmp_path)), "--nodes", "2", "--gpus-per-node", "4", "--zero", "3"]
    assert main([*flags, "--out", str(out), "train.batch_size=32", "model.dtype=bfloat16"]) == 0
    text = capsys.readouterr().out
    for part in ("memory of one rank", "traffic of one step", "time of one step", "GPU-hours", "assumptions"):
        assert part in text
    config = load_config(out / "plan.yaml")
    assert (config.train.batch_size, config.train.micro_batch, config.model.dtype) == (32, 4, "bfloat16")
    spec = read_spec(tiny_config("llama"))
    zero = zero_settings(config, spec, World(size=8, local_size=4))["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["stage3_max_live_parameters"] == 2 * zero["stage3_prefetch_bucket_size"] > 0


def test_settings_reload_whatever_the_recipe(tmp_path):
    out, mine = tmp_path / "plan", tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"recipe": "paper", "model": {"dtype": "float16"}, "sparsity": {"target": 0.3}}))
    flags = ["plan", "--model", str(config_file(tmp_path)), "--gpus-per-node", "2", "--config", str(mine)]
    assert main([*flags, "--out", str(out)]) == 0
    before, after = load_config(mine), load_config(out / "plan.yaml")
    assert after.deepspeed == str(out / "deepspeed.json")
    assert replace(after, model=before.model, train=before.train, deepspeed="") == before
    assert (after.model.path, after.model.dtype) == (str(tmp_path / "config.json"), "float16")


def test_type_of_the_checkpoint_unless_told(tmp_path, capsys):
    flags = ["plan", "--model", str(config_file(tmp_path, dtype="bfloat16")), "--gpus-per-node", "1", "--json"]
    for more, dtype in ([], "bfloat16"), (["model.dtype=float16"], "float16"):
        assert main([*flags, *more]) == 0
        assert json.loads(capsys.readouterr().out)["settings"]["model"]["dtype"] == dtype


def test_command_says_when_nothing_fits(capsys):
    flags = ["plan", "--model", "llama-3.1-70b", "--gpu-memory", "4GB", "model.dtype=bfloat16"]
    assert main(flags) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert "nothing fits: use" in out


def test_table_command(capsys):
    assert main(["plan", "--table", "--nodes", "4"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(MODELS)


MISTAKES = [
    (["--gpu-memory", "80XB"], "--gpu-memory '80XB': unknown unit 'XB'"),
    (["--gpu-memory", "80"], "unknown unit ''"),
    (["--gpu-memory", "much"], "not a number with a unit"),
    (["--gpu-memory", "0GB"], "must be greater than 0"),
    (["--inter-bandwidth", "400Gbit/s"], "--inter-bandwidth '400Gbit/s': unknown unit"),
    (["--flops", "990TB"], "--flops '990TB': unknown unit"),
    (["--nodes", "0"], "--nodes 0: must be at least 1"),
    (["--gpus-per-node", "-8"], "--gpus-per-node -8: must be at least 1"),
    (["--mfu", "1.5"], "--mfu 1.5: must be above 0"),
    (["--tokens-per-document", "0"], "--tokens-per-document 0: must be greater than 0"),
    (["--nodes", "3"], "train.batch_size 16 cannot be split over 24 ranks (3 x 8): set train.batch_size=24"),
    (["--model", "./nowhere/config.json"], "--model ./nowhere/config.json: there is no such file"),
    (["--model", ""], "--model is missing"),
    (["sparsity.target=0.999", "gates.units=[ffn]"], "sparsity.target 0.999 is out of reach"),
    (["data.documents=0"], "set train.steps"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_mistake_is_one_line(flags, message, capsys):
    assert main(["plan", "--model", "llama-7b", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_an_unsupported_model_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert "model type 'gpt2' is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("80GB", "bytes", 80e9), ("80 GiB", "bytes", 80 * 2**30), ("0.5TB", "bytes", 5e11), ("450GB/s", "rate", 450e9),
     ("990TFLOP/s", "flops", 990e12), ("1PFLOPS", "flops", 1e15), ("1e3MB", "bytes", 1e9)],
)  # fmt: skip
def test_quantities(text, kind, value):
    assert quantity("--x", text, kind) == value
