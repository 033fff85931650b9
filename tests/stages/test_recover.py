"""Rungs that recover: what is trained, what stays, and that export, ladder and fine-tuning take them by themselves."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nuteprune import load_masked
from nuteprune.__main__ import main
from nuteprune.config import load_config
from nuteprune.errors import UserError
from nuteprune.model.loading import read_base
from nuteprune.runs.students import open_run, pruned_student, snapshot_student
from nuteprune.stages import export, finetune, prune, recover


@pytest.fixture
def config(run_dir):
    """The configuration of a short recovery of two rungs of the finished run."""
    return load_config(run_dir, ["recover.ladder=[0.2,0.3]", "recover.steps=20", "tracking.progress=false"])


def students(config, rung):
    """(as pruning left it, as export takes it) of a rung."""
    trained = open_run(config.run_dir, config.model)
    spec = read_base(trained.config.model).spec
    found = tuple(find(config.export, trained, spec, rung) for find in (snapshot_student, pruned_student))
    return found, spec


def record(directory) -> dict:
    return json.loads((Path(directory) / "nuteprune.json").read_text())


def losses(directory) -> list[float]:
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["recover/loss"] for line in lines]


def test_a_rung_learns_and_keeps_its_units(config, run_dir):
    results = recover.run(config)
    assert [path.parent.name for path in results] == ["recover-0.2", "recover-0.3"]
    for rung in (0.2, 0.3):
        (before, after), _ = students(config, rung)
        for kind, gate in before.gates.as_dict().items():
            assert torch.equal(gate, after.gates.as_dict()[kind])
        assert any(not torch.equal(before.lora[k][1], after.lora[k][1]) for k in before.lora)
        history = losses(run_dir / f"recover-{rung:g}")
        assert len(history) == 20
        assert sum(history[-5:]) < sum(history[:5])


def test_what_is_said_of_training_is_done(config, run_dir):
    settings = ["recover.ladder=[0.2]", "recover.steps=2", "train.batch_size=2", "train.activation_checkpointing=true"]
    recover.run(load_config(config, settings))
    train = load_config(run_dir / "recover-0.2").train
    assert (train.batch_size, train.activation_checkpointing, train.steps) == (2, True, 2)


@pytest.mark.parametrize("rung", [0.1, 0.2, 0.3])
def test_a_rung_has_what_the_run_learned_to_its_end(rung, config, run_dir, text_file, monkeypatch):
    trained = open_run(config.run_dir, config.model)
    snapshot = min(trained.snapshots, key=lambda s: abs(s.sparsity - rung))
    (before, _), _ = students(config, rung)
    assert before.gates.settled
    assert not snapshot.gates.settled
    share, rank = (snapshot.sparsity / trained.sparsity) ** 0.5, trained.config.lora.rank
    for key, (a, b) in before.lora.items():
        torch.testing.assert_close(product((a, b), rank), share * product(trained.lora[key], rank))
        fitted = len(a) - rank
        assert fitted == (trained.config.lora.refit if key.endswith("down_proj") else 0)
        if fitted:
            used = len(snapshot.frozen[key][0])
            assert torch.equal(a[:used], snapshot.frozen[key][0].float())
            assert torch.equal(b[:, :used], snapshot.frozen[key][1].float())
            assert not a[used:fitted].any()
    merged = cross_entropy(config, rung, text_file)
    untrained = {key: (a, torch.cat([b[:, :-rank], 0 * b[:, -rank:]], 1)) for key, (a, b) in before.lora.items()}
    monkeypatch.setattr("nuteprune.runs.students.rung_lora", lambda *_: untrained)
    assert merged < cross_entropy(config, rung, text_file)


def product(pair, rank):
    a, b = pair
    return b[:, -rank:] @ a[-rank:]


def cross_entropy(config, rung, text_file) -> float:
    """Of a rung as pruning left it, on some of the training text."""
    masked = load_masked(config, [f"export.sparsity={rung}"])
    ids = masked.tokenizer(text_file.read_text()[:4000], return_tensors="pt").input_ids[:, :1024].view(-1, 32)
    return float(F.cross_entropy(masked.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_the_same_command_again_does_nothing_and_a_signal_loses_nothing(config, run_dir, leave_at):
    whole = recover.run(replace(config, recover=replace(config.recover, ladder=[0.2])))[0]
    wanted = {p.name: p.read_bytes() for p in (whole / "adapter").iterdir()}
    stamp = (whole / "manifest.json").stat().st_mtime_ns
    recover.run(config)
    assert (whole / "manifest.json").stat().st_mtime_ns == stamp

    shutil.rmtree(whole.parent)
    again = load_config(config, ["recover.ladder=[0.2]"])
    leave_at(recover.Recovering, 7, recover.run, again)
    resumed = recover.run(again)[0]
    assert {p.name: p.read_bytes() for p in (resumed / "adapter").iterdir()} == wanted


def test_export_and_fine_tuning_take_a_recovered_rung(config, run_dir, records):
    recover.run(config)
    small = load_config(config, ["export.sparsity=0.2", "evaluate.batch_sizes=[]"])
    assert record(export.run(small))["recovered"] == 20
    assert "Recovered | 20 steps" in (run_dir / "export" / "README.md").read_text()
    assert record(export.run(load_config(small, ["export.source=pruned"])))["recovered"] == 0
    finetune.run(load_config(config, [f"finetune.data={records}", "finetune.steps=1", "finetune.seq_len=32",
                                      "finetune.sparsity=0.2"]))  # fmt: skip
    tuned = record(export.run(small))
    assert (tuned["recovered"], tuned["finetuned"]) == (20, 1)
    ladder = ["export.ladder=[0.2,0.3]", "evaluate.batch_sizes=[]", "evaluate.window=64", "evaluate.blocks=2"]
    table = (export.run(load_config(config, ladder)) / "ladder.md").read_text()
    assert "recovered, steps" in table


def test_a_rung_is_not_recovered_behind_its_fine_tuning(config, run_dir, capsys):
    """Which went on from the rung as it was, and would be exported."""
    (run_dir / "finetune-0.2").mkdir()
    assert main(["recover", str(run_dir), "--ladder", "0.2,0.3"]) == 2
    assert "finetune-0.2 goes on from the rung as it is: remove it" in capsys.readouterr().err
    assert not list(run_dir.glob("recover-*"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ladder", "0.2,1.5"], "recover.ladder: give sparsities between 0 and 1"),
        ([], "recover.ladder: give sparsities between 0 and 1"),
        (["--sparsity", "0.9"], "sparsity 0.9: the run never got there"),
    ],
)
def test_mistakes_are_one_line(arguments, told, run_dir, capsys):
    assert main(["recover", str(run_dir), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not list(run_dir.glob("recover-*"))


def test_a_run_without_lora_has_nothing_to_recover_with(settings, capsys):
    config = load_config(None, [*settings, "lora.targets=[]", "train.steps=8"])
    prune.run(config)
    assert main(["recover", config.run_dir, "--ladder", "0.2"]) == 2
    assert "the run has no LoRA (lora.targets=[])" in capsys.readouterr().err
    assert not list(Path(config.run_dir).glob("recover-*"))


def test_without_a_finished_run_there_is_nothing_to_recover(tmp_path):
    with pytest.raises(UserError, match="holds no finished prune run"):
        recover.run(load_config(None, [f"run_dir={tmp_path}", "recover.ladder=[0.2]"]))
