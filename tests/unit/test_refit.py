"""Units that stay make up for those that leave: against plain least squares, and in whole runs."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import VOCAB, tiny_model
from transformers import AutoModelForCausalLM

from nuteprune.arch import read_spec
from nuteprune.config import LoraConfig, load_config
from nuteprune.data.batches import BatchStream
from nuteprune.errors import UserError
from nuteprune.masks import Gates
from nuteprune.masks.schedule import Schedule
from nuteprune.model.layers import build_view
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.distributed import World
from nuteprune.runs.rundir import load_adapter, load_run
from nuteprune.stages import export, finetune, prune, recover
from nuteprune.training import gram, refit
from nuteprune.training.refit import PART, RIDGE, Refit, low_rank, packed
from nuteprune.training.signals import Preempted

TEXT = torch.randint(0, VOCAB, (64, 32), generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def paired(name, ranks, **lora):
    hf = tiny_model(name)
    return PairedModel(hf, read_spec(hf.config), LoraConfig(refit=ranks, **lora))


def refitting(model, ranks):
    config = load_config(None, ["train.steps=100"])
    return Refit(model, ranks, Schedule.of(config, 0), World(), BatchStream(TEXT, 8, config.seed))


def some_leave(spec):
    gate = torch.ones(spec.layers, spec.ffn)
    gate[:, random(spec.ffn).argsort()[: spec.ffn // 2]] = 0
    return gate


def test_all_ranks_are_the_least_squares_fit_and_fewer_its_best_part():
    activations, weight = random(500, 12) @ random(12, 24, seed=1), random(10, 24, seed=2)
    gram, gate = activations.T @ activations, torch.ones(24)
    gate[[1, 4, 5, 6, 13, 17, 20, 23]] = 0
    stays, leaves = gate.bool(), ~gate.bool()
    # The ridge, as rows of data: each unit that stays is asked to be 0 where it alone fires.
    rows = torch.cat([activations[:, stays], (RIDGE * gram.diagonal()[stays]).sqrt().diag()])
    wanted = torch.cat([activations[:, leaves] @ weight[:, leaves].T, torch.zeros(int(stays.sum()), 10)])
    fit = torch.linalg.lstsq(rows.double(), wanted.double()).solution.T.float()
    errors = []
    for ranks in (1, 3, 10, 14):
        a, b = low_rank(weight, packed(gram.clone()), gate, ranks)
        assert a.shape == (ranks, 24)
        assert b.shape == (10, ranks)
        assert not a[:, leaves].any()
        errors.append(float(((b @ a)[:, stays] / PART @ rows.T - wanted.T).square().sum()))
        if ranks >= 10:
            torch.testing.assert_close((b @ a)[:, stays] / PART, fit, rtol=1e-3, atol=1e-4)
    assert errors[0] > errors[1] > errors[2]
    best = torch.linalg.svdvals(fit.double() @ rows.T.double()).square()
    assert errors[1] - errors[2] == pytest.approx(float(best[3:].sum()), rel=1e-2)


def test_nothing_is_fitted_where_no_unit_ever_fires():
    """An FFN whose weights are 0, as whoever prunes by zeros leaves it."""
    for leaving in (1, 5):
        a, b = low_rank(random(4, 6), packed(torch.zeros(6, 6)), (torch.arange(6) >= leaving).float(), 2)
        assert torch.equal(b @ a, torch.zeros(4, 6))


@pytest.mark.parametrize("gate", [torch.ones(6), torch.zeros(6)])
def test_nothing_is_fitted_where_all_or_no_units_stay(gate):
    a, b = low_rank(random(4, 6), packed(torch.eye(6)), gate, 2)
    assert not a.any()
    assert not b.any()


@pytest.mark.parametrize("setting", ["lora.targets=[q_proj]", "gates.units=[heads]", "recipe=paper"])
def test_no_ranks_are_kept_for_it_where_it_has_nothing_to_do(setting):
    assert load_config(None, []).lora.refit == 112
    assert load_config(None, [setting]).lora.refit == 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "olmo2", "phi3", "granite", "llama-bias"])
def test_the_student_is_nearer_to_the_intact_model(name):
    model = paired(name, ranks=16, rank=8, alpha=4.0)
    gates = Gates(ffn=some_leave(model.spec))
    refitting(model, 16).apply(gates)
    own = model.update.pairs()
    ids, distances = TEXT[:8], []
    with torch.no_grad():
        wanted = model.hidden(ids, build_view(model.spec, None, {}, model.scaling, torch.float32))
        for lora in ({}, own):
            found = model.hidden(ids, build_view(model.spec, gates, lora, model.scaling, torch.float32))
            distances.append(float((found - wanted).square().mean()))
    assert distances[1] < 0.95 * distances[0]
    assert len(own["0.down_proj"][0]) == 24
    assert len(own["0.up_proj"][0]) == 8


@torch.no_grad()
def grams_of_the_whole_model(model, ids):
    """G of each layer by running the whole model on all of the text."""
    taken, view = {}, build_view(model.spec, None, {}, model.scaling, model.dtype)
    for index, paired_layer in enumerate(model.layers):
        layer = paired_layer.layer
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x, i=index: taken.update({i: x[0].flatten(0, 1)}))
        layer.register_forward_hook(lambda *x, i=index: taken.update({-1 - i: x[-1].flatten(0, 1)}))
    model.hidden(ids, view)
    weighted = [
        taken[i] / (taken[-1 - i].square().mean(1, keepdim=True) + 1e-8).sqrt() for i in range(len(model.layers))
    ]
    return [h.T @ h for h in weighted]


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo3", "smollm3", "phi3", "granite", "llama-bias"])
def test_a_pass_layer_by_layer_sees_what_the_whole_model_does(name, monkeypatch):
    monkeypatch.setattr(gram, "TOKENS_AT_ONCE", 160)  # five sequences, and a part of four at the end
    model = paired(name, ranks=4)
    layers, found = list(range(model.spec.layers)), {}
    gram.measure_grams(model, TEXT, layers, World(), False, lambda: None, found.__setitem__)
    for index, wanted in enumerate(grams_of_the_whole_model(model, TEXT)):
        assert (found[index] - wanted).norm() < 1e-5 * wanted.norm()
        assert torch.equal(found[index], found[index].T)


def test_products_of_16_bits_are_summed_in_32():
    h, scale, total = random(300, 40), random(300, 1, seed=1).exp(), torch.zeros(40, 40)
    for part, its in zip(h.bfloat16().split(10), scale.split(10), strict=True):
        gram.add_gram(total, part, its)
    wanted = ((h * scale).T @ (h * scale)).triu()
    assert (total.triu() - wanted).norm() < 5e-3 * wanted.norm()


@pytest.mark.parametrize("optimizer", ["scaled", "adamw"])
def test_a_run_holds_its_refit_resumes_and_exports_it(settings, optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr(refit, "TIMES", 5)  # every third step: the start below falls between two refits
    more = ["train.steps=40", "sparsity.target=0.4", "lora.refit=5", "lora.rank=4", "lora.alpha=2.0",
            f"train.lora_optimizer={optimizer}", "teacher.lag=5"]  # fmt: skip
    config = load_config(None, [*settings, *more])
    prune.run(config)
    run = load_run(config.run_dir)
    a, b = run.lora["0.down_proj"]
    assert a.shape[0] == 9
    assert a[:5].any()
    # Not trained since the gates have settled: the same as fitted to them now.
    trainer = prune.Pruning.build(load_config(None, [*settings, *more, f"run_dir={tmp_path / 'again'}"]), World())
    trainer.refit.apply(run.gates)
    for key, (a, b) in trainer.model.update.frozen.items():
        torch.testing.assert_close(run.lora[key][0][:5], a, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(run.lora[key][1][:, :5], b, rtol=1e-3, atol=1e-5)
    assert json.loads((export.run(config) / "nuteprune.json").read_text())["sparsity"] == pytest.approx(0.4, abs=0.02)

    second = load_config(None, [*settings, *more, f"run_dir={tmp_path / 'resumed'}"])
    step = prune.Pruning.train_step

    def stopped(self):
        if self.step == 7:
            self.stop.received = 15
        return step(self)

    monkeypatch.setattr(prune.Pruning, "train_step", stopped)
    with pytest.raises(Preempted):
        prune.run(second)
    monkeypatch.setattr(prune.Pruning, "train_step", step)
    prune.run(second)
    for file in sorted(Path(config.run_dir, "pruned").rglob("*.safetensors")):
        left = load_file(file)
        right = load_file(Path(second.run_dir) / file.relative_to(config.run_dir))
        assert all(torch.equal(left[k], right[k]) for k in left), file


def test_what_was_measured_before_a_signal_is_not_measured_again(settings, tmp_path):
    settings = [*settings, "train.steps=20", "sparsity.target=0.4"]
    whole, parted = (load_config(None, [*settings, f"run_dir={tmp_path / name}"]) for name in ("whole", "parted"))
    prune.run(whole)
    trainer, looks = prune.Pruning.build(parted, World()), 0
    Path(parted.run_dir).mkdir()

    def halt():
        nonlocal looks
        looks += 1
        if looks == 5:  # two batches for importance, a part of the text for each of three layers
            trainer.stop.received = "SIGTERM"
        prune.Pruning.halt(trainer)

    trainer.halt = halt
    with pytest.raises(Preempted, match="SIGTERM outside of training"):
        trainer.start()
    stored = sorted(path.name.split(".")[0] for path in Path(parted.run_dir, "preparation").iterdir())
    assert stored == ["importance", "units-0", "units-1"]
    looked = []
    again = prune.Pruning.build(parted, World())
    again.importance, again.halt = None, lambda: looked.append(again)
    again.start()
    assert len(looked) == 3  # the text went through all layers, to measure the last
    next(Path(parted.run_dir, "preparation").glob("units-1*")).write_bytes(b"damaged")
    prune.run(parted)
    assert not Path(parted.run_dir, "preparation").exists()
    lines = [Path(config.run_dir, "metrics.jsonl").read_text().splitlines() for config in (whole, parted)]
    losses = [[json.loads(line)["prune/loss"] for line in each] for each in lines]
    assert losses[0] == losses[1]


def test_memory_is_asked_for_before_and_given_back_when_gates_settle(settings, monkeypatch):
    config = load_config(None, [*settings, "train.steps=20", "sparsity.target=0.4"])
    monkeypatch.setattr(refit, "free_memory", lambda: 20_000)  # three G of 40 units take 19,200, the text more
    trainer = prune.Pruning.build(config, World())
    with pytest.raises(UserError, match=r"^lora\.refit: 0\.0 GB of this .* are needed .* set lora\.refit=0"):
        trainer.refit.measure()
    monkeypatch.undo()
    trainer.refit.measure()
    trainer.step = 15
    trainer.constrain()
    assert trainer.masks.fixed is not None
    assert not trainer.refit._packed


def test_peft_opens_the_adapter_and_later_stages_go_on_from_it(settings, model_dir, records):
    config = load_config(None, [*settings, "train.steps=40", "sparsity.target=0.4", "lora.refit=5", "lora.rank=4",
                                "lora.alpha=2.0"])  # fmt: skip
    prune.run(config)
    directory = Path(config.run_dir, "pruned", "adapter")
    lora = load_adapter(directory)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(base, directory).merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for name in ("down_proj", "up_proj"):
        a, b = lora[f"0.{name}"]
        merged = getattr(with_adapter.model.layers[0].mlp, name).weight
        torch.testing.assert_close(merged, getattr(plain.model.layers[0].mlp, name).weight + 0.5 * b @ a)
    recover.run(load_config(f"{config.run_dir}/config.yaml", ["recover.ladder=[0.2]", "recover.steps=3"]))
    finetune.run(load_config(f"{config.run_dir}/config.yaml", [f"finetune.data={records}", "finetune.steps=2"]))
    tuned = load_adapter(Path(config.run_dir, "finetune", "tuned", "adapter"))
    torch.testing.assert_close(tuned["0.down_proj"][0][:5], lora["0.down_proj"][0][:5])
    assert not torch.equal(tuned["0.down_proj"][0][5:], lora["0.down_proj"][0][5:])
