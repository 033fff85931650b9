"""What ZeRO-3 moves and holds, counted on real ranks, against the planner and against two separate passes."""

import json
import sys
from pathlib import Path

import pytest
import ranks
import torch
from tiny import tiny_model

from nuteprune.bench import comm, memory
from nuteprune.config import load_config
from nuteprune.masks import MaskSet
from nuteprune.masks.schedule import Schedule
from nuteprune.model.loading import read_base
from nuteprune.parallel.distributed import connected, discover
from nuteprune.parallel.sizes import layer_tensors, partitioned, persistence_threshold, total_parameters
from nuteprune.parallel.zero import load_paired, zero_settings
from nuteprune.planning.costs import traffic
from nuteprune.planning.footprint import frozen_weights, lora_memory
from nuteprune.planning.job import Cluster, Job, Layout
from nuteprune.training.engine import Engine

LAYERS = 24


def measure() -> None:
    """In a rank: gathered bytes of both modes over the model's, bytes held over the planner's, which groups gather."""
    directory, out, deepspeed, checkpointing = sys.argv[1:]
    world = discover()
    config = load_config(None, [f"model.path={directory}", f"train.batch_size={world.size}", f"deepspeed={deepspeed}",
                                f"train.activation_checkpointing={checkpointing}", "lora.refit=0"])  # fmt: skip
    base_model = read_base(config.model)
    spec = base_model.spec
    job = Job(spec, config, Cluster(1, world.size))
    with connected(world, 60):
        settings, recomputed = zero_settings(config, spec, world), config.train.activation_checkpointing
        model = load_paired(base_model, config.lora, world, settings, recomputed)
        engine = Engine(model, MaskSet(spec, config.gates), None, Schedule.of(config, 0), world, sharded=True)
        ids = torch.randint(0, spec.vocab, (1, 16), generator=torch.Generator().manual_seed(world.rank))
        base = total_parameters(spec) * job.itemsize
        result = {}
        for mode in ("paired", "separate"):
            # DeepSpeed prefetches from the third step on.
            gathered = comm.count(lambda mode=mode: getattr(comm, mode)(model, ids, config.loss), 4)
            result[mode] = [gathered.total / 4 / base, traffic(job, Layout(3, 1), mode).ratio]
            result["by_ranks"] = gathered.by_ranks
            result[f"{mode} largest"] = gathered.largest
        alone = [[spec.vocab * spec.hidden], layer_tensors(spec)]
        largest = max(partitioned(tensors, world.size, persistence_threshold(spec))[0] for tensors in alone)
        result["largest planned"] = largest * job.itemsize
        engine.step(0)
        result["frozen"] = [memory.frozen_bytes(model), sum(frozen_weights(job, Layout(3, 1)).values())]
        planned = lora_memory(job, Layout(3, 1))
        shares = world.gather(memory.lora_bytes(engine))
        result["lora"] = [
            sum(shares) / len(shares),
            sum(planned[f"LoRA {k}"] for k in ("weights", "gradient", "moments")),
        ]
    if world.is_main:
        Path(out).write_text(json.dumps(result))


@pytest.fixture(scope="module")
def deep(tmp_path_factory, tokenizer):
    """A model of many layers, so that what its ends save does not count."""
    path = tmp_path_factory.mktemp("deep")
    tiny_model("qwen3", num_hidden_layers=LAYERS, tie_word_embeddings=False).save_pretrained(path)
    return path


@pytest.mark.parametrize(("size", "checkpointing"), [(2, "false"), (4, "true")])
def test_one_gather_a_layer_forward_and_one_backward(deep, tmp_path, size, checkpointing):
    out = tmp_path / "out.json"
    ranks.run([str(deep), str(out), "zero3", checkpointing], size, tmp_path / "logs", program=measure)
    result = json.loads(out.read_text())
    paired, separate = result["paired"][0], result["separate"][0]
    assert paired <= 2.05
    assert separate - paired > 0.95
    for name in ("paired", "separate", "frozen", "lora"):
        measured, planned = result[name]
        assert measured == pytest.approx(planned, rel=0.1), name
    # No layer is gathered together with the head.
    assert result["paired largest"] <= result["largest planned"]


def test_hpz_gathers_inside_the_node_only(deep, tmp_path):
    out, settings = tmp_path / "out.json", tmp_path / "hpz.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    ranks.run([str(deep), str(out), str(settings), "false"], 4, tmp_path / "logs", program=measure)
    result = json.loads(out.read_text())
    assert list(result["by_ranks"]) == ["2"], result
