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
from nuteprune.distilling.trainer import in_training
from nuteprune.masks import MaskSet
from nuteprune.model.layers import build_view
from nuteprune.model.pairing import PairedModel
from nuteprune.model.whole import Distillation, Root
from nuteprune.parallel.distributed import World
from nuteprune.parallel.sizes import layer_tensors, total_parameters
from nuteprune.parallel.zero import zero_settings
from nuteprune.planning.bill import (
    blocks_seconds,
    checkpoint_bytes,
    distillation_bytes,
    distillation_state,
    fitting_seconds,
    importance_seconds,
    pruning_bill,
    reading_seconds,
)
from nuteprune.planning.cards import CARDS, UNNAMED, card_named, quantity
from nuteprune.planning.costs import (
    LAUNCH_SECONDS,
    head_seconds,
    launch_seconds,
    mean_kept,
    over_links,
    read_seconds,
    step_flops,
    timing,
    traffic,
)
from nuteprune.planning.distilling import (
    distillation_host,
    distillation_memory,
    distillation_timing,
    distillation_traffic,
)
from nuteprune.planning.footprint import (
    activations,
    host_memory,
    logits_chunk,
    memory,
    pinned,
    rung_memory,
    saved_per_token,
)
from nuteprune.planning.job import (
    Cluster,
    Job,
    Layout,
)
from nuteprune.planning.machine import cluster_of, layout_of
from nuteprune.planning.models import MODELS, named_spec
from nuteprune.planning.planner import candidates, deepspeed_settings, lay_out, within

TOTALS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-3.2-1b": 1_235_814_400,
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
GPU = Cluster(1, 8, CARDS["h100"])


def job(model="llama-7b", nodes=1, gpus=8, *overrides, card="h100", **changes):
    config = load_config(None, ["model.dtype=bfloat16", f"train.batch_size={nodes * gpus}", *overrides])
    spec = named_spec(model) if isinstance(model, str) else model
    return Job(spec, config, Cluster(nodes, gpus, replace(CARDS[card], **changes)))


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
    plan = job(spec, 1, 1, f"gates.units={units}", "gates.shape=per_layer", "lora.refit=0")
    paired, masks = PairedModel(model, spec, plan.config.lora), MaskSet(spec, plan.config.gates)
    assert plan.lora_parameters == sum(t.numel() for pair in paired.lora().values() for t in pair)
    assert plan.gate_units == sum(p.numel() for p in masks.parameters())
    bank = plan.policy(spec, plan.config.teacher, 1.0, torch.device("cpu"), torch.float32)
    bank.record(0, 0.05, masks.deterministic(), masks.scores(), paired.lora())
    assert sum(plan.teacher_tensors) == bank.nbytes


def test_snapshots_and_those_that_can_teach():
    assert job("llama-7b", 1, 8, "train.steps=1000").snapshots == 20
    assert job("llama-7b", 1, 8, "train.steps=10").snapshots == 4  # one a step of the warm-up
    assert job("llama-7b", 1, 8, "teacher.mode=intact").snapshots == 0
    assert job().teaching == 0  # none is 20 intervals below 20%
    assert job("llama-7b", 1, 8, "sparsity.target=0.5").teaching == 20  # up to 0.4 x 50%
    assert job("llama-7b", 1, 8, "sparsity.target=0.5", "teacher.lag=40").teaching == 10


# ---- memory ----------------------------------------------------------------------------------------------------------


LAYER, HEAD, REFIT = "a layer runs", "the output loss runs", "refit fits a layer"


def test_memory_by_hand():
    """LLaMA-7B, bf16, 8 ranks: 1/8 of the matrices, norms whole; trained LoRA of 16·(4·(D+D) + 3·(D+F)), a frozen pair
    of 112·(D+F) in bfloat16."""
    plan = job("llama-7b", 1, 8, "train.steps=1000", "sparsity.target=0.5")
    need = memory(plan, Layout(3, 1))
    norms = 65 * 4096
    assert need.resident["frozen weights (1/8)"] == 2 * (TOTALS["llama-7b"] - norms) / 8
    assert need.resident["small tensors kept whole"] == 2 * norms
    trained, frozen = 32 * 16 * (4 * 8192 + 3 * 15104), 32 * 112 * 15104
    assert (plan.lora_parameters, plan.refit_parameters) == (trained, frozen)
    assert need.resident["LoRA weights"] == need.resident["LoRA gradient"] == 4 * trained
    assert need.resident["LoRA moments"] == 8 * trained / 8
    assert need.resident["frozen pairs of refit (student's, teachers')"] == 3 * 2 * frozen
    assert need.phases[LAYER]["gathered layers (3: at work, prefetched, its buffer)"] == 3 * 2 * (
        4 * 4096**2 + 3 * 4096 * 11008 + 8192
    )
    assert need.phases[HEAD]["gathered head"] == 2 * 32000 * 4096
    assert need.phases[HEAD]["logits of one KL chunk"] == logits_chunk(plan, 512) == 4 * 4 * 256 * 32000
    assert need.phases[REFIT]["G, what stays of it, its factor and a copy"] == 4 * 4 * 11008**2
    assert need.resident["gates and their optimizer"] == 12 * 32 * (11008 + 1)  # FFN units and attention
    assert need.peak == sum(need.resident.values()) + max(sum(parts.values()) for parts in need.phases.values())


def test_host_memory_by_hand():
    plan = job("llama-7b", 1, 8, "train.steps=1000", "sparsity.target=0.5")
    need = host_memory(plan, Layout(3, 1))
    assert need.pop("process: Python, libraries, CUDA") > 0
    pair = 2**22 + 2**20  # 112·11008 and 112·4096 elements of two bytes, each in a block of a power of two
    assert need == {
        "teachers (20 snapshots, pinned)": 20 * pinned(plan.teacher_tensors),
        "frozen pairs of teachers (20, pinned)": 20 * 32 * pair,
        "refit: G of removed units": 4 * 11008**2 * 4,
        "refit: down_proj of those layers": 2 * 4096 * 11008 * 4,
        "refit: hidden states of the text": 2 * 4096 * 32 * 11008 / 8,
    }


def test_refit_is_not_planned_where_there_is_none():
    for plan in job("llama-7b", 1, 8, "lora.refit=0"), job("qwen3-30b-a3b", 1, 8, "lora.targets=[q_proj]"):
        assert not plan.refit_parameters
        assert REFIT not in memory(plan, Layout(3, 1)).phases
        assert not any("refit" in name or "frozen" in name for name in host_memory(plan, Layout(3, 1)))


def test_rungs_are_held_by_rank_0():
    """At 20% no snapshot teaches: 20 of them have gates and scores, and a frozen pair each; at 50% 30 of 50 are rungs,
    and teachers hold 20 of the 25 pairs."""
    plan = job("llama-7b", 1, 8, "train.steps=1000")
    rung, pair = 8 * plan.gate_units, 2 * plan.refit_parameters
    assert rung_memory(plan) == 20 * (rung + pair)
    assert not any("teachers" in name for name in host_memory(plan, Layout(2, 1)))
    half = job("llama-7b", 1, 8, "train.steps=1000", "sparsity.target=0.5")
    assert rung_memory(half) == 30 * rung + 5 * pair


def test_pinned_blocks_are_powers_of_two():
    assert pinned([1, 2, 3, 1024, 1025]) == 1 + 2 + 4 + 1024 + 2048
    exact = sum(job().teacher_tensors)
    assert 1.0 < pinned(job().teacher_tensors) / exact < 2.0


def test_distillation_by_hand():
    """With the intact model's embedding and head, and, where hidden dimensions may leave, with its own."""
    spec, ends, cards = named_spec("llama-3.1-8b"), 2 * 128_256 * 4096, Cluster(1, 8, CARDS["h100"])
    decoder = 8_030_261_248 - ends - 6_979_321_856 / 2
    for units, own in ((["heads", "ffn"], 0), (["heads", "ffn", "hidden"], ends)):
        config = load_config(None, ["sparsity.target=0.5", "model.dtype=bfloat16"])
        job = Job(spec, replace(config, gates=replace(config.gates, units=units)), cards)
        shares = 4 * (own + decoder) / 8
        kept, again = (distillation_memory(job, Layout(stage, 1)) for stage in (2, 3))
        assert sum(kept.resident.values()) == pytest.approx(shares + 2 * (own + decoder) + 2 * 8_030_261_248)
        assert again.resident["two gathered layers and the ends"] == pytest.approx(2 * (own + 2 / 32 * decoder))
        learned = [phase.get("the decoder's gradient and moments (1/8)") for phase in kept.phases.values()]
        assert learned == [None, *[pytest.approx(8 * decoder / 8)] * 3]
        one = distillation_memory(replace(job, cluster=Cluster(1, 1, CARDS["h100"])), Layout(0, 1))
        assert sum(one.resident.values()) == pytest.approx(8 * shares + 2 * decoder + 2 * 8_030_261_248)


def test_host_memory_of_distillation_by_hand():
    """A checkpoint takes most where a node has many of the ranks, the fit where it has few."""
    run = job("llama-3.1-70b", 2)
    ends = 2 * 128_256 * 8192
    decoder = TOTALS["llama-3.1-70b"] - ends - 0.2 * run.spec.prunable
    saving = {"a checkpoint's share, copied and as a file": 2 * 8 * decoder / 16}
    process = {"process: Python, libraries, CUDA": 3e9}
    assert distillation_host(run, Layout(3, 1)) == (process | saving, {})
    assert distillation_memory(run, Layout(3, 1)).node(8) == 8 * (3e9 + sum(saving.values()))
    offloaded = distillation_host(run, Layout(3, 1, offload=True))[0]["offloaded weights (pinned)"]
    assert offloaded == host_memory(run, Layout(3, 1, offload=True))["offloaded weights (pinned)"]
    rank, first = distillation_host(job("llama-3.1-70b", 16, 1), Layout(3, 1))
    assert (rank, first) == (process, {"small model, float32": 4 * (ends + decoder)})


def test_zero2_keeps_weights_whole_and_offload_and_hpz_move_them():
    plan = job("llama-3.1-70b", 4)
    whole = memory(plan, Layout(2, 1))
    assert whole.resident["frozen weights (whole)"] == 2 * TOTALS["llama-3.1-70b"]
    assert whole.phases[LAYER]["gathered layers (3: at work, prefetched, its buffer)"] == 0
    plain, off, hpz = (memory(plan, Layout(3, 1, **kw)) for kw in ({}, {"offload": True}, {"hpz": True}))
    shard = plain.resident["frozen weights (1/32)"]
    assert plain.peak - off.peak == shard
    assert shard <= off.host["offloaded weights (pinned)"] < 2 * shard
    assert hpz.peak - plain.peak == 4 * shard


@pytest.mark.parametrize(
    "layout", [Layout(3, 1), Layout(3, 1, True), Layout(3, 1, offload=True), Layout(3, 1, hpz=True)]
)
def test_more_nodes_take_less_memory(layout):
    peaks = [memory(job("llama-3.1-70b", nodes), layout).peak for nodes in (1, 2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4


def test_checkpointing_and_micro_batch_take_less_memory():
    plan = job("llama-7b", 1, 8, "train.batch_size=64")
    large, small = memory(plan, Layout(3, 8)).peak, memory(plan, Layout(3, 4)).peak
    assert memory(plan, Layout(3, 8, True)).peak < small < large


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layer_weight", [0, 0.9])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_activations_are_what_autograd_saves(name, layer_weight, checkpointing, dtype):
    """Bytes of distinct tensors that one paired forward saves, held within 10% of the count."""
    model = tiny_model(name, **WIDE).to(getattr(torch, dtype))
    spec = read_spec(model.config)
    plan = job(
        spec, 1, 1, f"model.dtype={dtype}", "data.seq_len=64", "lora.refit=0", f"loss.layer_weight={layer_weight}"
    )
    paired, masks = PairedModel(model, spec, plan.config.lora, checkpointing), MaskSet(spec, plan.config.gates)
    gates = masks.sample(torch.Generator().manual_seed(0))
    student = build_view(spec, gates, paired.lora(), paired.scaling, paired.dtype)
    teacher = build_view(spec, None, {}, paired.scaling, paired.dtype)
    saved = saved_bytes(lambda ids: paired(ids, student, teacher, plan.config.loss), model)
    final = memory(plan, Layout(3, 4)).phases[HEAD]
    counted = activations(plan, checkpointing) * TOKENS + final["final hidden states and their gradient"]
    counted -= plan.itemsize * spec.hidden * TOKENS  # the normed states are there too, and not saved
    assert counted == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "gemma3", "olmo2"])
def test_activations_of_distillation_are_what_autograd_saves(name, checkpointing, dtype):
    """Of a small model with half of the heads and FFN units."""
    half = {"intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 1}
    model = tiny_model(name, **WIDE).to(getattr(torch, dtype))
    spec = read_spec(model.config)
    plan = job(
        spec, 1, 1, f"model.dtype={dtype}", "data.seq_len=64", "lora.refit=0", "sparsity.target=0.5",
        f"train.activation_checkpointing={checkpointing}".lower(),
    )  # fmt: skip
    small = in_training(tiny_model(name, **WIDE | half), plan.config)
    teacher = PairedModel(model, spec, replace(plan.config.lora, targets=[], refit=0))
    losses = Distillation(Root(small), teacher, range(spec.layers), range(spec.hidden), plan.config.loss)
    saved = saved_bytes(losses, model, small)
    need = distillation_memory(plan, Layout(0, 4, checkpointing)).phases
    counted = need["a layer learns"]["activations of the student"]
    counted += (4 + 2 * plan.itemsize) * spec.hidden * TOKENS  # the last norm's
    assert counted == pytest.approx(saved, rel=0.1)


WIDE = {
    "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 8, "head_dim": 8, "num_hidden_layers": 6,
}  # fmt: skip
TOKENS = 4 * 64


def saved_bytes(forward, *models):
    """Of distinct tensors that a forward pass saves, without the models' weights, also in another type."""
    weights = {weight.untyped_storage().data_ptr() for model in models for weight in model.parameters()}
    shapes = {shape for model in models for w in model.parameters() for shape in (w.shape, w.shape[::-1])}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        other = storage.data_ptr() not in weights and tensor.shape not in shapes
        if other and storage.nbytes() > 8 * TOKENS:  # not LoRA, gates, indices
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward(torch.randint(0, 300, (4, 64)))
    return sum(size for size, _ in saved.values())


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
    two = Cluster(2, 4)
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
    alone = traffic(job("llama-3.1-70b", 1, 1), Layout(3, 1, offload=True))
    assert (alone.gathered, alone.host) == (0, pytest.approx(plain.gathered, rel=1e-3))


# ---- time ------------------------------------------------------------------------------------------------------------


def test_flops_by_hand():
    plan = job("llama-7b", 1, 8, "teacher.mode=none")
    spec, tokens = plan.spec, 8 * 512
    attention, head = 32 * 2 * 512 * 4096, 2 * 32000 * 4096
    trained, frozen = 2 * plan.lora_parameters, 2 * plan.refit_parameters
    lora = trained + frozen
    assert step_flops(plan, False, (1.0, 1.0)) == tokens * (
        4 * spec.prunable + 3.5 * attention + 3 * trained + 2 * frozen + 2 * head
    )
    again = step_flops(plan, True, (1.0, 1.0)) - step_flops(plan, False, (1.0, 1.0))
    assert again == tokens * (2 * spec.prunable + attention + lora)
    half = step_flops(plan, False, (0.5, 1.0)) - tokens * 2 * head
    assert half == (step_flops(plan, False, (1.0, 1.0)) - tokens * 2 * head) / 2


def test_the_bracket_of_a_step():
    plan = job("llama-3.1-70b", 2)
    t = timing(plan, Layout(3, 1), (1.0, 1.0))
    assert t.step == t.compute + t.gather + t.reduce > t.launch == 80 * LAUNCH_SECONDS  # one micro-batch
    assert t.best == max(t.compute, t.gather) + t.reduce < t.step
    assert timing(plan, Layout(3, 1, True), (1.0, 1.0)).launch == pytest.approx(t.launch * 4 / 3)
    moved = traffic(plan, Layout(3, 1))
    assert t.gather == max(moved.intra / 450e9, moved.inter / 50e9)


def test_a_slower_card_takes_longer():
    """4090 and 3090 compute by their own FLOP/s and move weights over PCIe; float32 has a peak of its own."""
    jobs = [job("llama-7b", 1, 8, card=card) for card in ("h100", "4090", "3090")]
    h100, ada, ampere = (timing(each, Layout(3, 1), (1.0, 1.0)) for each in jobs)
    products = [step.compute - head_seconds(each) for step, each in zip((h100, ada), jobs, strict=False)]
    assert products[1] == pytest.approx(products[0] * 989 / 165.2)
    assert ada.gather == ampere.gather == pytest.approx(h100.gather * 450 / 32)
    single = timing(job("llama-7b", 1, 8, "model.dtype=float32", card="4090"), Layout(3, 1), (1.0, 1.0))
    assert single.compute - head_seconds(jobs[1]) == pytest.approx(products[1] * 2)


def test_few_tokens_are_bound_by_the_memory_of_the_card():
    plan = job("qwen3-30b-a3b", 1, 8, "gates.shape=uniform", "gates.units=[ffn]", "data.seq_len=16")
    t = timing(plan, Layout(3, 1), (1.0, 1.0))
    assert t.compute == read_seconds(plan, Layout(3, 1), (1.0, 1.0)) + head_seconds(plan)
    assert read_seconds(plan, Layout(3, 1), (1.0, 1.0)) == 3 * 2 * plan.spec.prunable / 3.35e12


def test_offloaded_weights_are_waited_for():
    plan = job("llama-7b", 2)
    plain, off = (timing(plan, Layout(3, 1, offload=offload), (1.0, 1.0)) for offload in (False, True))
    assert plain.offload == 0
    assert off.step == pytest.approx(plain.step + traffic(plan, Layout(3, 1, offload=True)).host / 64e9)


def test_kept_shares_follow_schedule_and_teachers():
    wanted = ["sparsity.constraint=lagrangian", "sparsity.warmup=0.5", "sparsity.target=0.4", "train.steps=1000"]
    student, teacher = mean_kept(job("llama-7b", 1, 8, *wanted))
    assert student == pytest.approx(1 - (0.5 * 0.2 + 0.5 * 0.4), abs=1e-3)
    assert student < teacher < 1
    assert mean_kept(job("llama-7b", 1, 8, "teacher.mode=intact", "train.steps=100"))[1] == 1.0


def test_steps_of_the_paper():
    assert job("llama-7b", 1, 8, "recipe=paper", "train.batch_size=16").steps == 7297
    assert round(7 * (20_000 * 427 // 512) / 16) == 7297


# ---- the bill --------------------------------------------------------------------------------------------------------


def test_importance_by_hand():
    plan = job("llama-7b", 1, 1, "gates.importance_tokens=65536", "train.batch_size=16")
    spec, tokens = plan.spec, 65536
    flops = tokens * (4 * spec.prunable + 3.5 * 32 * 2 * 512 * 4096 + 4 * 32000 * 4096)
    launches = 128 * launch_seconds(spec) * 2 / 3  # one by one the card waits for the thread that launches
    assert importance_seconds(plan, Layout(0, 1)) == pytest.approx(launches)
    assert importance_seconds(plan, Layout(0, 16)) == pytest.approx(flops / (0.4 * 989e12))
    slow = replace(plan, cluster=Cluster(1, 1, CARDS["3090"]))
    assert importance_seconds(slow, Layout(0, 16)) == pytest.approx(flops / (0.4 * 71e12))
    assert not importance_seconds(job("llama-7b", 1, 1, "gates.init=drop_rate"), Layout(0, 1))


def test_refit_by_hand():
    """On one card: a forward pass of 32 tokens a unit with G, streams and G to host memory; 26 fits of each layer."""
    plan = job("llama-7b", 1, 1, "train.batch_size=16", "train.steps=1000")
    spec, tokens, f, d = plan.spec, 32 * 11008, 11008, 4096
    compute = tokens * (2 * spec.prunable + 32 * 2 * 512 * d + 32 * 2 * f**2 * 9 / 16) / (0.4 * 989e12)
    copies = (2 * 32 * 2 * d * tokens + 32 * 4 * f**2) / 64e9
    assert reading_seconds(plan, Layout(0, 16)) == pytest.approx(compute + copies)
    r = 0.2 * f  # at the end
    least = 32 * (f**3 / (0.4 * 67e12) + 26 * 4 * f**2 / 64e9)
    most = least + 26 * 32 * (r**3 / 3 + 3 * r**2 * d + 4 * r * d**2 + 2 * r * f * 112) / (0.4 * 67e12)
    assert least < fitting_seconds(plan, Layout(0, 16)) < most
    assert reading_seconds(job("llama-7b", 1, 1, "lora.refit=0"), Layout(0, 1)) == 0
    assert fitting_seconds(job("llama-7b", 1, 1, "lora.refit=0"), Layout(0, 1)) == 0


@pytest.mark.parametrize("cost", [importance_seconds, reading_seconds, fitting_seconds])
def test_ranks_share_the_preparation(cost):
    one, eight = (cost(job("llama-3.1-70b", 1, ranks, "train.batch_size=8"), Layout(3, 1)) for ranks in (1, 8))
    assert eight < one / 3


def test_checkpoints_of_a_7b_run_are_small():
    """Snapshots and frozen pairs are written once, so that a run of 2,000 steps writes 12 GB at most."""
    for target, pairs in ((0.2, 20), (0.5, 25)):
        plan = job("llama-7b", 1, 8, "train.steps=2000", f"sparsity.target={target}", "checkpoint.every=200")
        written = checkpoint_bytes(plan, 1.0)
        state = 12 * (plan.lora_parameters + plan.gate_units) + 2 * plan.refit_parameters
        assert written["states (9)"] == 9 * state
        assert written[f"their frozen pairs ({pairs})"] == pairs * 2 * plan.refit_parameters
        assert "refit: G" not in written  # 15.5 GB
        assert sum(written.values()) <= 12e9
    by_time = checkpoint_bytes(job("llama-7b", 1, 8, "train.steps=2000"), 3.0)
    assert by_time["states (20)"] == 20 * state  # one in five minutes


def test_checkpoints_take_at_most_5_percent_of_distillation():
    plan = job("llama-3.1-70b", 2, 8, "distill.steps=1080")
    state, step = distillation_state(plan), 20.0
    states = distillation_bytes(plan, step)
    number = next(round(size / state) for name, size in states.items() if name.startswith("states"))
    saving = (number - 1) * 2 * state / plan.cluster.disk  # the first stands behind the fit
    assert number > 1
    assert saving <= 0.05 * (1080 * step + saving)


def test_the_bill_is_the_sum_of_its_parts():
    plan = job("llama-3.1-70b", 2)
    step = timing(plan, Layout(3, 1, hpz=True), mean_kept(plan))
    found = pruning_bill(plan, Layout(3, 1, hpz=True), step)
    assert set(found.parts) == {
        "loading the model", "starting, compiling kernels", "importance of units", "refit: reading the text",
        "refit: fits while units leave", f"{plan.steps:,} steps", "checkpoints and result",
    }  # fmt: skip
    assert found.parts[f"{plan.steps:,} steps"] == plan.steps * step.step
    assert found.total == sum(found.parts.values())
    assert found.best == pytest.approx(found.total - plan.steps * (step.step - step.best))
    several = job("llama-7b", 1, 8, "gates.shape=uniform", "gates.units=[kv_groups,ffn]")
    step = timing(several, Layout(2, 1), (1.0, 1.0))  # 12 structures on 4 batches at a quarter of a step
    assert pruning_bill(several, Layout(2, 1), step).parts["measuring structures"] == 12 * step.step


def test_a_step_of_distillation_by_hand():
    """8B at 50%: three weights' FLOP of the small model and one of the intact one's for each of pruning's four."""
    plan = job("llama-3.1-8b", 1, 1, "train.batch_size=16", "sparsity.target=0.5", "distill.steps=9")
    spec, tokens = plan.spec, 16 * 512
    attention, ends = 32 * 2 * 512 * 4096, 128_256 * 4096
    decoder = 8_030_261_248 - 2 * ends - spec.prunable / 2
    flops = tokens * (2 * spec.prunable + attention + (6 * spec.prunable + 3.5 * attention) / 2 + 6 * ends)
    found = distillation_timing(plan, Layout(0, 4))
    beside = 4 * 6 * decoder + 2 * (16 + 8) * decoder  # copies in the model's type, and AdamW
    expected = flops / (0.4 * 989e12) + beside / 3.35e12 + head_seconds(plan)
    assert found.compute == pytest.approx(expected)
    assert head_seconds(plan) == 61 * 4 * 128_256 * tokens / 3.35e12
    again = distillation_timing(plan, Layout(0, 4, True)).compute - found.compute
    assert again == pytest.approx(tokens * (2 * spec.prunable + attention) / 2 / (0.4 * 989e12))


def test_what_distillation_gathers_by_hand():
    """The intact model once a micro-batch, the small decoder twice, and its gradient in float32 to its owners."""
    plan = job("llama-3.1-70b", 1, 8, "train.batch_size=32")
    spec = plan.spec
    decoder = TOTALS["llama-3.1-70b"] - 2 * 128_256 * 8192 - 0.2 * spec.prunable
    moved = distillation_traffic(plan, Layout(3, 1))
    assert moved.gathered == pytest.approx(4 * 2 * (TOTALS["llama-3.1-70b"] + 2 * decoder), rel=1e-4)
    assert moved.reduce_intra == pytest.approx(4 * 4 * decoder * 7 / 8)
    assert distillation_traffic(plan, Layout(3, 4)).gathered == moved.gathered / 4
    assert distillation_traffic(job("llama-7b", 1, 1), Layout(0, 1)).gathered == 0


def test_the_fit_is_a_small_part_of_70b_on_16_cards():
    assert blocks_seconds(job("llama-3.1-70b", 2), Layout(3, 1)) < 600


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_a_small_model_stays_whole_and_a_large_one_is_partitioned():
    assert lay_out(job("llama-7b")).pruning.layout == Layout(2, 1)
    plan = lay_out(job("llama-3.1-70b", 4))
    assert plan.pruning.layout == Layout(3, 1, hpz=True)
    assert not any(option.fits for option in plan.stages[0].tried if option.layout.stage == 2)


def test_hpz_keeps_its_copy_in_a_node_whatever_nodes_a_stage_gets(tmp_path):
    """Fine-tuning has nodes of its own, and reads what was planned for pruning's of 8."""
    plan, file = lay_out(job("llama-3.1-70b", 4)), tmp_path / "deepspeed.json"
    file.write_text(json.dumps(deepspeed_settings(plan.pruning.layout)))
    config = load_config(None, ["train.batch_size=12", f"deepspeed={file}"])
    zero = zero_settings(config, plan.job.spec, World(size=12, local_size=4))
    assert zero["zero_optimization"]["zero_hpz_partition_size"] == 4


def test_8b_on_one_card_neither_offloads_nor_partitions():
    """Whatever micro-batch was configured, one is taken whose launches the card does not wait for."""
    for configured in (0, 1, 2, 16):
        plan = lay_out(job("llama-3.1-8b", 1, 1, "train.batch_size=16", f"train.micro_batch={configured}"))
        layout = plan.pruning.layout
        assert (layout.stage, layout.offload, layout.checkpointing) == (0, False, False)
        assert layout.micro_batch in (4, 8)


def test_one_card_offloads_only_what_does_not_fit():
    assert lay_out(job("llama-13b", 1, 1, card="4090")).pruning.layout.offload
    assert all(layout.offload for layout in candidates(job("llama-7b", 1, 1), "auto") if layout.stage == 3)


def test_micro_batches_above_and_below_the_configured_one_are_tried():
    sizes = {layout.micro_batch for layout in candidates(job("llama-7b", 1, 8, "train.batch_size=96",
                                                             "train.micro_batch=5"), "auto")}  # fmt: skip
    assert sizes == {1, 2, 3, 5, 6, 12}


def test_a_run_without_a_micro_batch_takes_what_fits_its_settings_and_memory():
    def taken(memory, deepspeed, stage="prune"):
        run = job("llama-7b", 1, 8, "train.batch_size=96", f"deepspeed={deepspeed}", memory=memory)
        zero = zero_settings(run.config, run.spec, World(size=8, local_size=8))
        found = within(stage, run, layout_of(zero, False))
        return found.micro_batch, found.checkpointing

    whole, shared = ([taken(memory, zero) for memory in (10e9, 24e9, 400e9)] for zero in ("", "zero3"))
    assert whole[0] == (1, True)  # the least there is
    assert (whole[1][1], shared[1]) == (True, (6, False))
    assert 1 < whole[2][0] <= 12
    assert not whole[2][1]
    assert not taken(70e9, "")[1]
    assert (
        taken(70e9, "", "distill")[0] < taken(70e9, "")[0]
    )  # the small model's weights, gradient and moments are there too


def test_a_layout_is_read_from_complete_deepspeed_settings():
    def read(name):
        config = load_config(None, ["train.batch_size=8", f"deepspeed={name}"])
        return layout_of(zero_settings(config, named_spec("llama-7b"), World(size=8, local_size=4)), True)

    assert read("") == Layout(0, 1, True)
    assert read("zero2") == Layout(2, 1, True)
    assert read("zero3_offload") == Layout(3, 1, True, offload=True)
    assert read("zero3_hpz") == Layout(3, 1, True, hpz=True)


@pytest.mark.parametrize("local_size", [2, 1])
def test_nodes_with_different_numbers_of_ranks_hold_all_of_them(local_size):
    """Two ranks on the first node, one on the second: 3 sequences are one a rank, whichever node is asked."""
    config = load_config(None, ["train.batch_size=3", "train.steps=2"])
    assert Job(named_spec("llama-7b"), config, cluster_of(World(size=3, local_size=local_size))).local_batch == 1


def test_equal_nodes_are_taken_as_they_are():
    found = cluster_of(World(size=16, local_size=8))
    assert (found.nodes, found.gpus_per_node) == (2, 8)


def test_each_stage_has_a_layout_of_its_own():
    """70B on two nodes of 8 at 20%: pruning keeps activations, distillation computes them again."""
    steps = ["train.steps=120", "distill.steps=1080", "checkpoint.every=200"]
    alone, both = lay_out(job("llama-3.1-70b", 2, 8, steps[0])), lay_out(job("llama-3.1-70b", 2, 8, *steps))
    assert alone.distilling is None
    assert alone.peak == alone.pruning.peak
    assert both.pruning == alone.pruning
    assert both.distilling.layout.checkpointing > both.pruning.layout.checkpointing
    assert both.fits
    assert not both.distilling.layout.offload
    assert both.node_memory == both.distilling.memory.node(8) > alone.node_memory
    found = both.distilling.bill.total
    states = 6 * 8 * (TOTALS["llama-3.1-70b"] - 2 * 128_256 * 8192 - 0.2 * both.job.spec.prunable)  # of 0, 200, …
    assert found > 1080 * both.distilling.timing.step + 2 * states / 1e9
    assert both.seconds == pytest.approx(both.pruning.bill.total + found + sum(both.beside.values()))
    assert alone.limits["hours"] == 1
    assert both.limits["hours"] >= 1.5 * found / 3600
    assert alone.limits["signal_seconds"] == 300
    assert both.limits["signal_seconds"] >= 1.5 * 2 * states / 6 / 1e9


@pytest.mark.parametrize(
    ("model", "nodes", "cards", "offloads"),
    [("llama-3.1-8b", 1, 1, False), ("llama-13b", 1, 4, False), ("llama-3.1-70b", 1, 8, True),
     ("llama-3.1-70b", 2, 8, False)],
)  # fmt: skip
def test_half_of_these_is_distilled_on_cards_of_80_gb(model, nodes, cards, offloads):
    plan = lay_out(job(model, nodes, cards, "train.batch_size=16", "train.steps=200", "distill.steps=1800",
                       "sparsity.target=0.5"))  # fmt: skip
    assert plan.fits
    assert plan.distilling.layout.offload == offloads


@pytest.mark.parametrize("batch", [8, 256])
@pytest.mark.parametrize("gpu_memory", [16e9, 24e9, 40e9, 80e9])
def test_about_the_fastest_that_fits_is_chosen(gpu_memory, batch):
    plan = lay_out(job("llama-13b", 1, 8, f"train.batch_size={batch}", memory=gpu_memory))
    found = plan.pruning
    assert found.memory.peak <= 0.9 * gpu_memory
    others = [each for each in plan.stages[0].tried if each.fits and each.layout.offload == found.layout.offload]
    assert found.bill.total <= 1.02 * min(option.bill.total for option in others)


def test_where_nothing_fits_the_smallest_is_shown():
    plan = lay_out(job("llama-3.1-70b", 1, 8, memory=4e9))
    assert not plan.fits
    assert plan.pruning.layout == Layout(3, 1, True, True)


# ---- the command -----------------------------------------------------------------------------------------------------


def config_file(tmp_path, **changes):
    tiny_config("llama", **changes).save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_command_writes_settings_that_load(tmp_path, capsys):
    out = tmp_path / "plan"
    flags = ["plan", str(config_file(tmp_path)), "--nodes", "2", "--gpus-per-node", "4", "--zero", "3"]
    assert (
        main([*flags, "--out", str(out), "--verbose", "train.batch_size=32", "train.steps=9", "model.dtype=bfloat16"])
        == 0
    )
    text = capsys.readouterr().out
    assert text.startswith("fits: ")
    for part in ("checkpoints", "memory of one rank", "traffic of one step", "time of one step", "GPU-hours",
                 "batch 32", "other layouts", "assumptions"):  # fmt: skip
        assert part in text
    config = load_config(out / "plan.yaml")
    assert (config.train.batch_size, config.train.micro_batch, config.model.dtype) == (32, 0, "bfloat16")
    spec = read_spec(tiny_config("llama"))
    zero = zero_settings(config, spec, World(size=8, local_size=4))["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["stage3_max_live_parameters"] == 2 * zero["stage3_prefetch_bucket_size"] > 0


def test_settings_reload_whatever_the_recipe(tmp_path):
    out, mine = tmp_path / "plan", tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"recipe": "paper", "model": {"dtype": "bfloat16"}, "sparsity": {"target": 0.3}}))
    flags = ["plan", str(config_file(tmp_path)), "--gpus-per-node", "2", "--config", str(mine)]
    assert main([*flags, "--out", str(out)]) == 0
    before, after = load_config(mine), load_config(out / "plan.yaml")
    assert after.deepspeed == str(out / "deepspeed.json")
    assert replace(after, model=before.model, train=before.train, deepspeed="") == before
    assert (after.model.path, after.model.dtype) == (str(tmp_path / "config.json"), "bfloat16")


def test_type_of_the_checkpoint_unless_told(tmp_path, capsys):
    flags = ["plan", str(config_file(tmp_path, dtype="bfloat16")), "--gpus-per-node", "1", "--json"]
    for more, dtype in ([], "bfloat16"), (["model.dtype=float32"], "float32"):
        assert main([*flags, *more]) == 0
        assert json.loads(capsys.readouterr().out)["settings"]["model"].get("dtype", "float32") == dtype


def test_command_says_when_nothing_fits(capsys):
    flags = ["plan", "llama-3.1-70b", "--gpu-memory", "4GB", "model.dtype=bfloat16"]
    assert main(flags) == 1
    out = capsys.readouterr().out
    assert out.startswith("does not fit: prune needs")
    assert "DOES NOT FIT" in out
    assert "what would fit" in out


def test_one_card_needs_no_deepspeed(tmp_path, capsys):
    out, mine = tmp_path / "plan", tmp_path / "mine.yaml"
    mine.write_text("deepspeed: zero2\n")
    flags = ["plan", str(config_file(tmp_path)), "--gpus-per-node", "1", "--config", str(mine)]
    assert main([*flags, "--out", str(out)]) == 0
    assert [file.name for file in out.iterdir()] == ["plan.yaml"]
    assert load_config(out / "plan.yaml").deepspeed == ""


def test_plan_answers_for_run(tmp_path, capsys):
    """Without steps, those that `run` would choose; the first line is the verdict; each stage has its settings."""
    out = tmp_path / "plan"
    assert main(["plan", "llama-3.1-70b", "--sparsity", "0.5", "--gpu", "h100", "--gpus", "8", "--out", str(out)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("fits: ")
    assert told[0].endswith("arithmetic, never measured on a card")
    assert [line.split()[0] for line in told[2:6]] == ["prune", "distill", "export", "evaluate"]
    assert "200 steps" in told[2]
    assert "1,800 steps" in told[3]
    config = load_config(out / "plan.yaml")
    assert (config.train.steps, config.distill.steps, config.model.dtype) == (200, 1800, "bfloat16")
    zeros = [json.loads(file.read_text()) for file in (out / "deepspeed.json", out / "distill-deepspeed.json")]
    assert [config.deepspeed, config.distill.deepspeed] == [
        str(out / "deepspeed.json"),
        str(out / "distill-deepspeed.json"),
    ]
    assert ["offload_param" in zero["zero_optimization"] for zero in zeros] == [False, True]
    assert main(["plan", "llama-3.1-8b", "--gpu", "4090", "--gpus", "1"]) == 0
    assert "distill: left out: needs" in capsys.readouterr().out


def test_command_says_what_distillation_takes(capsys):
    flags = ["plan", "llama-3.1-70b", "--nodes", "2", "--verbose", "train.steps=120"]
    assert main([*flags, "distill.steps=1080"]) == 0
    told = capsys.readouterr().out
    for part in ("1,080 steps", "distill: memory of one rank", "fitting layers", "distilled model"):
        assert part in told
    assert main([*flags, "distill.steps=1080", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["node_memory"] == 8 * sum(found["stages"][1]["chosen"]["memory"]["host"].values())
    assert main(flags) == 0
    assert "\ndistill" not in capsys.readouterr().out


def test_limits_of_a_job(capsys):
    assert main(["plan", "llama-7b", "model.dtype=bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["limits"]["hours"] >= 1.5 * found["stages"][0]["chosen"]["bill"]["total"] / 3600
    assert found["limits"]["gigabytes"] >= 1.25 * found["node_memory"] / 1e9


@pytest.mark.parametrize(
    ("flags", "told"),
    [([], "80.0 GB, h100"), (["--gpu", "A100-40"], "40.0 GB, a100-40"), (["--gpu", "h100", "--gpu-memory", "94GB"],
     "94.0 GB, h100"), (["--gpu-memory", "24GB"], "24.0 GB, 3090 (no --gpu was given: the slowest known)")],
)  # fmt: skip
def test_card_of_the_flags(flags, told, capsys):
    assert main(["plan", "llama-3.2-1b", "model.dtype=bfloat16", "train.steps=100", "--verbose", *flags]) in (0, 1)
    assert told in capsys.readouterr().out


def test_a_card_without_a_name_is_the_slowest():
    assert min(CARDS.values(), key=lambda card: card.flops) == UNNAMED
    assert UNNAMED.link == min(card.link for card in CARDS.values())
    assert card_named("MI300X").memory == 192e9


MISTAKES = [
    (["--gpu-memory", "80XB"], "--gpu-memory '80XB': unknown unit 'XB'"),
    (["--gpu-memory", "80"], "unknown unit ''"),
    (["--gpu-memory", "much"], "not a number with a unit"),
    (["--gpu-memory", "0GB"], "must be greater than 0"),
    (["--inter-bandwidth", "400Gbit/s"], "--inter-bandwidth '400Gbit/s': unknown unit"),
    (["--flops", "990TB"], "--flops '990TB': unknown unit"),
    (["--gpu", "h900"], "--gpu h900: not known; use one of h100, h200, h100-pcie, a100, a100-40, l40s"),
    (["--disk-bandwidth", "1GB"], "--disk-bandwidth '1GB': unknown unit"),
    (["--nodes", "0"], "--nodes 0: must be at least 1"),
    (["--gpus-per-node", "-8"], "--gpus-per-node -8: must be at least 1"),
    (["--mfu", "1.5"], "--mfu 1.5: must be above 0"),
    (["--tokens-per-document", "0"], "--tokens-per-document 0: must be a number greater than 0"),
    (["--tokens-per-document", "inf"], "--tokens-per-document inf: must be a number greater than 0"),
    (
        ["--nodes", "3", "train.steps=9"],
        "train.batch_size 16 cannot be split over 24 ranks (3 x 8): set train.batch_size=24",
    ),
    (["model.path=./nowhere/config.json"], "model.path: ./nowhere/config.json: there is no such file"),
    (["model.path="], "name a model: a directory"),
    (["model.path=llama-3.1-700b"], "known without the hub: llama-7b, llama-13b"),
    (["sparsity.target=0.999", "gates.units=[ffn]"], "sparsity.target 0.999 is out of reach"),
    (["data.documents=0", "train.epochs=1"], "set train.steps"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_mistake_is_one_line(flags, message, capsys):
    assert main(["plan", "llama-7b", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_an_unsupported_model_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert main(["plan", str(tmp_path)]) == 2
    assert "model type 'gpt2' is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"hidden_size": 64, "num_attention_heads": 3}, "not a multiple of the number of attention heads (3)"),
        ({"hidden_size": "a"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "no readable config.json there"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 heads and 3 key-value heads: such a model cannot be"),
        ({"num_hidden_layers": 0}, "config.json has 0 layers"),
    ],
)
def test_a_model_that_cannot_be_is_one_line(tmp_path, capsys, sizes, told):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
    assert main(["plan", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("80GB", "bytes", 80e9), ("80 GiB", "bytes", 80 * 2**30), ("0.5TB", "bytes", 5e11), ("450GB/s", "rate", 450e9),
     ("990TFLOP/s", "flops", 990e12), ("1PFLOPS", "flops", 1e15), ("1e3MB", "bytes", 1e9)],
)  # fmt: skip
def test_quantities(text, kind, value):
    assert quantity("--x", text, kind) == value
