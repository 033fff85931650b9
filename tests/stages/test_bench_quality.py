"""The quality benchmark fills its table: runs of several seeds, rungs, and fine-tuning; and says what is equal."""

import json
import math
import shutil

import pytest
import torch
from tiny import QUIET, tiny_model

from benchmarks import quality
from nuteprune.evaluation.measure import compare, last_states, perplexity
from nuteprune.training import blocks


def test_rows_of_a_run_its_rungs_and_fine_tuning(model_dir, text_file, records, tmp_path, capsys):
    settings = ["gates.importance_tokens=1", *QUIET, "train.micro_batch=4", "finetune.steps=1",
                "finetune.seq_len=32", "finetune.batch_size=1", "data.seq_len=32"]  # fmt: skip
    arguments = ["--model", model_dir, "--train", text_file, "--test", text_file, "--sparsities", "0.4", "--variants",
                 "ours", "--steps", "30", "--seeds", "2", "--blocks", "1",
                 "--out", tmp_path / "out", "--finetune", records, "--recover", "--ladder",
                 "0.2", "0.6"]  # fmt: skip
    command = [*map(str, arguments), *(f"--set={s}" for s in settings)]
    assert quality.main(command) == 0
    runs = json.loads((tmp_path / "out" / "quality.json").read_text())["runs"]
    one = [("ours", 0.4), ("ours, tuned", 0.4), ("ours, rung", 0.2), ("ours, rung, recovered", 0.2),
           ("ours, rung, tuned", 0.2)]  # fmt: skip
    assert [(r["variant"], r["sparsity"]) for r in runs] == [("intact", 0.0), *one, *one]
    assert len({r["perplexity"]["train"] for r in runs}) == 11
    assert runs[0]["kl"]["train"] == pytest.approx(0, abs=1e-6)
    assert all(r["kl"]["train"] > 0.01 for r in runs[1:])
    assert [len(row) for row in quality.rows(runs).values()] == [1, 2, 2, 2, 2, 2]  # both seeds of each row
    assert "ours, rung, tuned" in capsys.readouterr().out
    # What is measured is taken as it is, and never mixed with what was measured otherwise.
    assert quality.main(command) == 0
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["runs"] == runs
    assert quality.main([*command, "--blocks", "2"]) == 2
    assert "another blocks" in capsys.readouterr().err


@pytest.mark.parametrize("meanwhile", ["a row is measured", "the intact model is scored"])
def test_two_commands_fill_one_table(meanwhile, model_dir, text_file, tmp_path, monkeypatch):
    command = ["--model", model_dir, "--train", text_file, "--test", text_file, "--sparsities", "0.4", "--steps", "2",
               "--blocks", "1", "--out", tmp_path / "out", "--set", "gates.importance_tokens=1",
               *(f"--set={setting}" for setting in QUIET), "--set", "data.seq_len=32"]  # fmt: skip
    command = list(map(str, command))
    place, name = (quality, "measure") if meanwhile == "a row is measured" else (quality.Scorer, "score")
    own = getattr(place, name)

    def beside(*arguments):
        if place is quality or arguments[1] == str(model_dir):
            monkeypatch.undo()
            assert quality.main([*command, "--variants", "no-teacher"]) == 0
        return own(*arguments)

    monkeypatch.setattr(place, name, beside)
    assert quality.main([*command, "--variants", "ours"]) == 0
    runs = json.loads((tmp_path / "out" / "quality.json").read_text())["runs"]
    assert [run["variant"] for run in runs] == ["intact", "no-teacher", "ours"]
    # Another model is a row of its own, against its own intact one.
    other = shutil.copytree(model_dir, tmp_path / "other")
    assert quality.main([*command, "--model", str(model_dir), str(other), "--variants", "ours"]) == 0
    runs = json.loads((tmp_path / "out" / "quality.json").read_text())["runs"]
    assert [(run["model"], run["variant"]) for run in runs[3:]] == [("other", "intact"), ("other", "ours")]
    assert quality.lost(runs, runs[4:], "train") == quality.lost(runs, runs[2:3], "train")


def test_a_distilled_row_spends_its_steps_on_both(model_dir, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "STEPS", 30)
    settings = ("gates.importance_tokens=256", *QUIET, "data.seq_len=32")
    command = ["--model", model_dir, "--train", text_file, "--test", text_file, "--sparsities", "0.4", "--steps", "7",
               "--blocks", "1", "--out", tmp_path, "--variants", "ours", "distilled",
               *(f"--set={setting}" for setting in settings)]  # fmt: skip
    assert quality.main(list(map(str, command))) == 0
    (run,) = tmp_path.glob("*/distilled-*")
    for file, steps in ((run / "metrics.jsonl", 3), (run / "distill/metrics.jsonl", 4)):
        assert len(file.read_text().splitlines()) == steps
    ours, distilled = json.loads((tmp_path / "quality.json").read_text())["runs"][1:]
    assert ours["kl"]["train"] != distilled["kl"]["train"]


def test_documents_held_out_are_not_trained_on(tmp_path):
    file = tmp_path / "c4.jsonl"
    # A line separator inside a record ends no record.
    file.write_text("".join(f'{{"text": "{n}\u2028"}}\n' for n in range(9)), encoding="utf-8")
    train, (held_out,) = quality.split(file, 2, tmp_path)
    texts = [[json.loads(line)["text"] for line in part.open(encoding="utf-8")] for part in (train, held_out)]
    assert texts == [[f"{n}\u2028" for n in range(7)], ["7\u2028", "8\u2028"]]


def test_rows_within_two_standard_errors_are_equal():
    assert quality.verdict({0: 10.0, 1: 11.0, 2: 12.0}, {0: 10.5, 1: 10.5, 2: 12.5}) == "equal"
    # Seeds that move both rows alike do not hide what lies between them.
    assert quality.verdict({0: 10.0, 1: 20.0, 2: 40.0}, {0: 9.0, 1: 18.1, 2: 36.0, 3: 1.0}) == "0.902"
    assert quality.verdict({0: 20.0}, {0: 10.0, 1: 3.0}) == "0.500, one seed"
    assert quality.verdict({0: 20.0}, {1: 3.0}) == ""
    assert math.isnan(quality.mean([1.0])[1])


@pytest.mark.parametrize("first", [(), (7,)])
def test_divergence_and_perplexity_are_those_of_the_definition(first):
    intact, other = tiny_model("granite"), tiny_model("granite", seed=1)  # whose logits are scaled
    ids = torch.randint(300, (70,), generator=torch.Generator().manual_seed(0))
    blocks = ids[: 2 * (32 - len(first))].view(2, -1)
    blocks = torch.cat([torch.tensor([first] * 2, dtype=torch.int64), blocks], 1)
    with torch.no_grad():
        p, q = (m(blocks).logits.log_softmax(-1) for m in (intact, other))
    wanted = float((p.exp() * (p - q)).sum(-1).mean())
    states = [last_states(m, ids, 32, 0, first) for m in (intact, other)]
    found = compare(intact, states[0], other, states[1], ids, first)
    assert found == pytest.approx((perplexity(other, ids, 32, 0, first=first)["perplexity"], wanted), rel=1e-4)
    assert compare(intact, states[0], intact, states[0], ids, first)[1] == 0
