"""The optimizer side: gradients that lie in one buffer, and shards of AdamW's state."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from nuteprune.arch import projections, read_spec
from nuteprune.config import load_config
from nuteprune.masks import MaskSet
from nuteprune.masks.schedule import Schedule
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.distributed import World
from nuteprune.training.engine import RELATIVE_RATE, Engine, relative_rate
from nuteprune.training.importance import unit_costs
from nuteprune.training.resume import restore_optimizer


def engine(dtype=torch.float32, *settings) -> Engine:
    hf = tiny_model("llama").to(dtype)
    config = load_config(None, ["gates.ffn_multiple=1", "train.steps=10", *settings])
    spec = read_spec(hf.config)
    return Engine(
        PairedModel(hf, spec, config.lora), MaskSet(spec, config.gates), None, Schedule.of(config, 0), World()
    )


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_the_rate_is_a_share_of_the_weights_that_lora_updates(family):
    hf = tiny_model(family)
    config, spec = load_config(None, ["gates.ffn_multiple=1", "train.steps=10"]), read_spec(hf.config)
    model = PairedModel(hf, spec, config.lora)
    weights = [getattr(*owned).weight for layer in model.layers for owned in projections(layer.layer).values()]
    size = torch.cat([weight.flatten() for weight in weights]).square().mean().sqrt()
    first = relative_rate(model, RELATIVE_RATE)
    assert first == pytest.approx(RELATIVE_RATE * float(size), rel=0.05)  # two digits
    with torch.no_grad():
        for weight in weights:
            weight.mul_(10)
    assert relative_rate(model, RELATIVE_RATE) == pytest.approx(10 * first, rel=1e-6)
    wider = PairedModel(tiny_model(family), spec, replace(config.lora, rank=64))
    assert relative_rate(wider, RELATIVE_RATE) == pytest.approx(first / 2, rel=0.05)
    made = Engine(model, MaskSet(spec, config.gates), None, Schedule.of(config, 0), World())
    assert made.peak == relative_rate(model, RELATIVE_RATE)
    made.step(9)
    assert made.optimizers["lora"].param_groups[0]["lr"] < made.peak


def test_a_rate_that_is_given_is_taken():
    assert engine(torch.float32, "train.lora_lr=0.5").peak == 0.5


def test_a_parameter_without_a_part_in_the_step_has_a_zero_gradient_in_the_buffer():
    e = engine()
    e.backward(e.lora[0].sum())
    assert e.lora[1].grad.abs().sum() == 0
    assert e.gradients.sum() == e.lora[0].numel()
    e.discard()
    assert e.lora[0].grad.abs().sum() == 0


def test_a_gradient_that_overflows_changes_nothing():
    e = engine()
    before = e.lora[0].detach().clone()
    e.backward(e.lora[0].sum() * float("inf"))
    assert e.step(0).skipped
    assert torch.equal(e.lora[0], before)


def test_gates_of_all_kinds_move_by_what_a_parameter_of_theirs_is_worth():
    e = engine(torch.float32, "gates.units=[ffn,attn_sublayers]")
    alphas, costs = e.masks.log_alpha, unit_costs(e.masks.spec)
    before = {kind: alpha.detach().clone() for kind, alpha in alphas.items()}
    with torch.no_grad():
        alphas["ffn"].grad[0, 0] = 1e-6 * costs["ffn"]
        alphas["ffn"].grad[1, 3] = -2e-6 * costs["ffn"]
        alphas["attn_sublayers"].grad[1] = 1e-6 * costs["attn_sublayers"]
    e.step(0)
    moved = {kind: (before[kind] - alpha).detach() for kind, alpha in alphas.items()}
    step = moved["ffn"][0, 0]
    assert step > 0
    torch.testing.assert_close(moved["attn_sublayers"][1], step)
    torch.testing.assert_close(moved["ffn"][1, 3], -2 * step)
    assert sum(int(m.count_nonzero()) for m in moved.values()) == 3
    # Whatever the loss's scale: the root mean square of 1, 2 and 1 is that of 2.
    rate = e.optimizers["gates"].param_groups[0]["lr"]
    torch.testing.assert_close(step, torch.tensor(rate / 2**0.5))


@pytest.fixture
def two_ranks():
    """A process group of two ranks whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_restored_steps_of_a_sharded_fused_adamw_are_on_the_card(two_ranks):
    with FakeTensorMode():  # tensors of a card without one
        parameters = [torch.nn.Parameter(torch.zeros(8, 4, device="cuda:0")) for _ in range(3)]
        optimizer = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-3, fused=True)
        saved = {f"{i}.{key}": torch.zeros(8, 4) for i in range(3) for key in ("exp_avg", "exp_avg_sq")}
        saved |= {f"{i}.step": torch.tensor(7.0) for i in range(3)}
        restore_optimizer(optimizer, saved)
        own = optimizer.optim.state
        assert own
        assert {t.device.type for entries in own.values() for t in entries.values()} == {"cuda"}


def test_restored_steps_of_a_plain_adamw_stay_on_the_host():
    parameter = torch.nn.Parameter(torch.zeros(4, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    restore_optimizer(optimizer, {"0.step": torch.tensor(7.0), "0.exp_avg": torch.zeros(4, device="meta"),
                                   "0.exp_avg_sq": torch.zeros(4, device="meta")})  # fmt: skip
    assert optimizer.state[parameter]["step"].device.type == "cpu"
    assert optimizer.state[parameter]["exp_avg"].is_meta


def test_collecting_shards_waits_for_their_copies(monkeypatch, two_ranks):
    """The copies to the host are asynchronous, and what is saved is read by safetensors, which does not wait."""
    order = []

    class Sharded:
        def consolidate_state_dict(self, to):
            order.append("copied")

    e = engine()
    e.optimizers["lora"], e.world = Sharded(), World(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(f"waited for {device}"))
    e.collect()
    assert order == ["copied", "waited for cuda:0"]
