"""The finetune stage: fixed gates, every answer token counts alike, resume, and the way into the export."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from nuteprune import load_masked
from nuteprune.__main__ import main
from nuteprune.config import load_config
from nuteprune.errors import UserError
from nuteprune.model.layers import build_view
from nuteprune.model.loading import read_base
from nuteprune.model.losses import IGNORE
from nuteprune.parallel.distributed import World
from nuteprune.planning import machine
from nuteprune.runs.rundir import load_run
from nuteprune.runs.students import open_run
from nuteprune.runs.tuned import load_tuned
from nuteprune.stages import export, finetune, prune, recover
from nuteprune.training.signals import Preempted


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "records.json"
    rows = [
        {"prompt": f"The {thing} of {n}", "completion": f" is {'very ' * (n % 5)}{thing} in the evening."}
        for n in range(12)
        for thing in ("river", "harbour", "network")
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def tuning(run_dir, records):
    """The configuration of a short fine-tuning of the finished run."""
    return load_config(run_dir, [f"finetune.data={records}", "finetune.seq_len=128", "finetune.batch_size=4",
                                 "finetune.steps=12", "finetune.lr=3e-3"])  # fmt: skip


def changed(config, **values):
    return replace(config, finetune=replace(config.finetune, **values))


def metrics(directory) -> list[dict]:
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if not k.endswith(("tokens_per_s", "memory_gb", "step_s"))} for m in lines]


def build(config) -> finetune.Finetuning:
    """The trainer at step 0."""
    torch.manual_seed(0)
    trained = open_run(config.run_dir, config.model)
    base = read_base(trained.config.model)
    return finetune.Finetuning.build(finetune.settings(config, trained, base.spec), World(), trained, base)


def test_the_rate_follows_the_weights_and_is_half_of_pruning(tuning):
    trained = open_run(tuning.run_dir, tuning.model)
    recovering = recover.settings(load_config(tuning.run_dir, []), trained, 0.2)
    recovered = recover.Recovering.build(recovering, World(), trained, read_base(trained.config.model))
    wanted = recovered.engine.peak / 2
    assert build(changed(tuning, lr=0.0, lora_rank=0)).engine.peak == pytest.approx(wanted, rel=0.05)  # two digits
    assert build(changed(tuning, lr=3e-3)).engine.peak == 3e-3


def test_answers_are_learned_with_the_gates_fixed(tuning, run_dir):
    directory = finetune.run(load_config(tuning, ["tracking.report_to=[tensorboard]"]))
    assert directory == run_dir / "finetune" / "tuned"
    lines = metrics(run_dir / "finetune")
    assert len(lines) == 12
    assert lines[-1]["finetune/label_loss"] < 0.9 * lines[0]["finetune/label_loss"]
    run = load_run(run_dir)
    gates = load_file(directory / "gates.safetensors")
    assert all(torch.equal(gates[f"gates.{k}"], z) for k, z in run.gates.as_dict().items())
    tuned = load_tuned(directory, run, "")
    assert tuned.lora.keys() == run.lora.keys()
    assert not any(torch.equal(tuned.lora[k][1], run.lora[k][1]) for k in run.lora)
    answers = sum(m["finetune/answer_tokens"] for m in lines)
    assert (tuned.facts["steps"], tuned.facts["answer_tokens"]) == (12, answers)
    events = EventAccumulator(str(run_dir / "finetune" / "tensorboard")).Reload()
    assert [s.step for s in events.Scalars("finetune/loss")] == list(range(12))


def test_as_many_windows_at_a_time_as_the_planner_finds_room_for(tuning, monkeypatch, caplog):
    """Also in recovering and pruning."""
    caplog.set_level("INFO")
    trained = open_run(tuning.run_dir, tuning.model)
    recovering = recover.settings(load_config(tuning.run_dir, []), trained, 0.2)
    pruning = replace(trained.config, train=replace(trained.config.train, micro_batch=0))
    for free, wanted in ((8 << 30, 4), (0, 1)):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        recovered = recover.Recovering.build(recovering, World(), trained, read_base(trained.config.model))
        trainers = (build(tuning), recovered, prune.Pruning.build(pruning, World()))
        assert [trainer.micro_batch for trainer in trainers] == [wanted] * 3
    planned = [r.getMessage() for r in caplog.records if "as planned" in r.getMessage()]
    assert [line.startswith("1 of 4 sequences at a time") for line in planned] == [True] * 3


def test_every_answer_token_of_a_step_counts_alike(tuning):
    """However the step is split into micro-batches: windows hold unequal numbers of answer tokens."""
    config = changed(tuning, micro_batch=0, batch_size=3)
    whole, split = build(config), build(changed(config, micro_batch=1))
    counts = (whole.stream.batch(0)[:, 1] != IGNORE).sum(1)
    assert len(set(counts.tolist())) > 1

    def gradient(trainer):
        loss = trainer.accumulate(lambda windows: trainer.forward(windows, None))["loss"]
        return loss, torch.cat([p.grad.flatten() for pair in trainer.model.lora().values() for p in pair])

    (loss, wanted), (split_loss, got) = gradient(whole), gradient(split)
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-6)


def test_a_signal_saves_and_the_next_start_ends_bit_identical(tuning, run_dir, tmp_path, monkeypatch):
    tuning = replace(tuning, checkpoint=replace(tuning.checkpoint, every=3))
    whole = shutil.copytree(run_dir, tmp_path / "whole")
    finetune.run(replace(tuning, run_dir=str(whole)))
    original = finetune.Finetuning.train_step

    def signalled(trainer):
        if trainer.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer)

    monkeypatch.setattr(finetune.Finetuning, "train_step", signalled)
    with pytest.raises(Preempted, match="at step 8 of 12"):
        finetune.run(tuning)
    monkeypatch.undo()
    assert sorted(p.name for p in (run_dir / "finetune/checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    finetune.run(tuning)
    assert metrics(run_dir / "finetune") == metrics(whole / "finetune")
    left, right = (load_file(d / "finetune/tuned/adapter/adapter_model.safetensors") for d in (run_dir, whole))
    assert all(torch.equal(left[k], right[k]) for k in left)
    with pytest.raises(UserError, match=r"belongs to a run with .*lora_lr=0.003, not 0.01"):
        finetune.run(changed(tuning, lr=0.01))


def test_a_higher_rank_starts_from_the_same_student(tuning):
    trainer = build(changed(tuning, lora_rank=20, distill=0.5))
    run = load_run(tuning.run_dir)
    model, ids = trainer.model, trainer.stream.batch(0)[:, 0]
    assert {a.shape[0] for a, _ in model.lora().values()} == {20}
    assert {a.shape[0] for a, _ in model.update.whole.values()} == {20 + 112}  # with those of lora.refit in down_proj
    views = [model.view(run.gates), build_view(model.spec, run.gates, run.lora, 1.0, torch.float32)]
    with torch.no_grad():
        mine, wanted = (model.logits(ids, view) for view in views)
    assert torch.allclose(mine, wanted, atol=1e-4)
    step = trainer.train_step()
    assert step["loss"] > step["label_loss"] > 0  # the intact model teaches too
    with pytest.raises(UserError, match=r"finetune.lora_rank 4 is less than the pruned student's 16"):
        build(changed(tuning, lora_rank=4))


@pytest.mark.parametrize("sparsity", [0.0, 0.2])
def test_the_export_takes_the_fine_tuned_student(tuning, run_dir, sparsity, capsys, records):
    arguments = [str(run_dir), *([f"--sparsity={sparsity}"] if sparsity else [])]
    assert main(["export", *arguments, f"export.output={run_dir / 'before'}"]) == 0
    assert main(["export", *arguments, "--from", "finetuned"]) == 2
    assert "run `nuteprune finetune" in capsys.readouterr().err
    assert main(["finetune", *arguments, "--data", str(records), "finetune.seq_len=128", "finetune.steps=3",
                 "finetune.batch_size=2"]) == 0  # fmt: skip
    assert main(["export", *arguments]) == 0
    capsys.readouterr()
    assert main(["distill", str(run_dir)]) == 2
    assert "is fine-tuned on records, which distill would undo" in capsys.readouterr().err
    assert main(["export", *arguments, "--from", "pruned", f"export.output={run_dir / 'pruned-again'}"]) == 0
    before, after, again = (load_file(run_dir / name / "model.safetensors") for name in
                            ("before", "export", "pruned-again"))  # fmt: skip
    assert {k: t.shape for k, t in before.items()} == {k: t.shape for k, t in after.items()}
    assert all(torch.equal(before[k], again[k]) for k in before)
    assert any(not torch.equal(before[k], after[k]) for k in before)

    masked = load_masked(run_dir, [f"export.sparsity={sparsity}"])
    small = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.allclose(small(ids).logits, masked.logits(ids), atol=1e-3)


def test_a_student_fine_tuned_from_an_earlier_pruning_is_refused(tuning, run_dir):
    finetune.run(changed(tuning, steps=1))
    manifest = run_dir / "pruned" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(UserError, match="comes from an earlier pruning"):
        export.run(tuning)
    assert export.run(replace(tuning, export=replace(tuning.export, source="pruned"))).is_dir()


def test_another_base_model_is_refused(tuning, run_dir, tmp_path, capsys):
    other = shutil.copytree(tuning.model.path, tmp_path / "other")
    assert main(["export", str(run_dir), f"model.path={other}"]) == 0  # the same weights elsewhere
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    for stage in ("export", "finetune"):
        assert main([stage, str(run_dir), f"model.path={other}", f"finetune.data={tuning.finetune.data}"]) == 2
        assert "is not the base model that was pruned" in capsys.readouterr().err
        assert main([stage, str(run_dir), "model.path=/nowhere/model", f"finetune.data={tuning.finetune.data}"]) == 2
        assert "nuteprune: model.path /nowhere/model: there is no such directory" in capsys.readouterr().err


def test_a_directory_that_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["finetune", str(tmp_path)]) == 2
    assert "it has no config.yaml" in capsys.readouterr().err
