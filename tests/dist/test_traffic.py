"""What ZeRO-3 moves and holds, counted on real ranks, against the planner and against two separate passes."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import ranks
import torch
from tiny import tiny_model

from nuteprune.config import load_config
from nuteprune.masks import MaskSet
from nuteprune.masks.schedule import Schedule
from nuteprune.model.layers import build_view
from nuteprune.model.loading import read_base
from nuteprune.parallel.distributed import connected, discover
from nuteprune.parallel.sizes import layer_tensors, partitioned, persistence_threshold, total_parameters
from nuteprune.parallel.zero import load_paired, zero_settings
from nuteprune.planning.costs import traffic
from nuteprune.planning.footprint import frozen_weights, lora_memory
from nuteprune.planning.job import Cluster, Job, Layout
from nuteprune.training.engine import Engine

pytestmark = pytest.mark.xdist_group("ranks")

LAYERS = 24


class GatheredBytes:
    """Counts the bytes that DeepSpeed gathers on this rank, by the ranks that take part, and of the largest gather."""

    def __init__(self):
        self.by_ranks: dict[int, int] = {}
        self.largest = 0

    @property
    def total(self) -> int:
        return sum(self.by_ranks.values())

    @contextmanager
    def counting(self):
        """Count inside the block."""
        from deepspeed.comm import comm

        backend = comm.cdb
        original = backend.all_gather_into_tensor

        def counted(output_tensor, input_tensor, *args, **kwargs):
            ranks = output_tensor.numel() // input_tensor.numel()
            self.by_ranks[ranks] = self.by_ranks.get(ranks, 0) + output_tensor.nbytes
            self.largest = max(self.largest, output_tensor.nbytes)
            return original(output_tensor, input_tensor, *args, **kwargs)

        backend.all_gather_into_tensor = counted
        try:
            yield self
        finally:
            backend.all_gather_into_tensor = original


def count(step, steps: int) -> GatheredBytes:
    """What several steps gather, after a first one."""
    step()
    with GatheredBytes().counting() as gathered:
        for _ in range(steps):
            step()
    return gathered


def paired(model, ids: torch.Tensor, loss) -> None:
    """Teacher and student in one pass, as a run does it."""
    model(ids, model.student(None), intact(model), loss).total.backward()


def separate(model, ids: torch.Tensor, loss) -> None:
    """The teacher's pass, then the student's."""
    with torch.no_grad():
        model(ids, intact(model), None, loss)
    model(ids, model.student(None), None, loss).total.backward()


def intact(model):
    return build_view(model.spec, None, {}, model.scaling, model.dtype)


MODES = {"paired": paired, "separate": separate}


def frozen_bytes(model) -> int:
    """Bytes of the frozen weights that this rank holds between steps: its shards, and small tensors that are whole."""
    return sum(p.nbytes if p.ds_persist else p.ds_tensor.nbytes for p in model.parameters())


def lora_bytes(engine: Engine) -> int:
    """Bytes of LoRA, its gradient and this rank's AdamW moments."""
    optimizer = engine.optimizers["lora"]
    optimizer = getattr(optimizer, "optim", optimizer)  # the shard's own, where it is spread over the ranks
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    return sum(t.nbytes for t in [*engine.lora, *(p.grad for p in engine.lora), *moments])


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
        for mode in MODES:
            # DeepSpeed prefetches from the third step on.
            gathered = count(lambda mode=mode: MODES[mode](model, ids, config.loss), 4)
            result[mode] = [gathered.total / 4 / base, traffic(job, Layout(3, 1), mode).ratio]
            result["by_ranks"] = gathered.by_ranks
            result[f"{mode} largest"] = gathered.largest
        alone = [[spec.vocab * spec.hidden], layer_tensors(spec)]
        largest = max(partitioned(tensors, world.size, persistence_threshold(spec))[0] for tensors in alone)
        result["largest planned"] = largest * job.itemsize
        engine.step(0)
        result["frozen"] = [frozen_bytes(model), sum(frozen_weights(job, Layout(3, 1)).values())]
        planned = lora_memory(job, Layout(3, 1))
        shares = world.gather(lora_bytes(engine))
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


def test_hpz_gathers_inside_the_node_only(model_dir, tmp_path):
    out, settings = tmp_path / "out.json", tmp_path / "hpz.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    ranks.run([str(model_dir), str(out), str(settings), "false"], 4, tmp_path / "logs", program=measure)
    result = json.loads(out.read_text())
    assert list(result["by_ranks"]) == ["2"], result
