"""The ladder: every rung exported and compared in one run, the knee, and rungs that are not there."""

import json
import math

import pytest

from nuteprune.__main__ import main
from nuteprune.config import load_config
from nuteprune.errors import UserError
from nuteprune.evaluation import ladder
from nuteprune.runs.checkpoint import verify
from nuteprune.training.signals import Preempted


@pytest.fixture
def arguments(run_dir, text_file):
    return ["export", str(run_dir), f"evaluate.text={text_file}", "evaluate.window=32", "evaluate.blocks=2",
            "evaluate.prompt_tokens=8", "evaluate.new_tokens=2", "evaluate.batch_sizes=[1]",
            "evaluate.prompts=2"]  # fmt: skip


def test_every_rung_is_exported_and_compared(arguments, run_dir, records, capsys, monkeypatch):
    assert main(["finetune", str(run_dir), "--data", str(records), "--sparsity", "0.2", "finetune.steps=2",
                 "finetune.seq_len=32", "finetune.batch_size=1"]) == 0  # fmt: skip
    assert main([*arguments, "--ladder", "0.4,0.1,0.2"]) == 0
    printed = capsys.readouterr().out
    directory = run_dir / "ladder"
    verify(directory)
    found = json.loads((directory / "ladder.json").read_text())
    points = found["points"]
    assert [p["sparsity"] for p in points] == [0.0, 0.1, 0.2, 0.4]
    sizes = [p["parameters"] for p in points]
    assert sizes == sorted(sizes, reverse=True)
    for point in points[1:]:
        record = json.loads((directory / f"{point['sparsity']:g}" / "nuteprune.json").read_text())
        assert record["sparsity"] == pytest.approx(point["sparsity"], abs=0.01)
        assert point["perplexity"] > 0
        assert point["prefill"] > 0
        assert point["delta_nll"] == pytest.approx(math.log(point["perplexity"] / points[0]["perplexity"]))
    assert points[0]["prefill"] == 1.0
    assert [p.get("finetuned", 0) for p in points] == [0, 0, 2, 0]
    assert found["knee"] == ladder.knee(points)
    assert "| intact |" in printed
    assert "| perplexity | ΔNLL | loops |" in printed
    assert (directory / "ladder.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((directory / "evaluate" / "report.json").read_text())
    scores = [m["perplexity"]["train.txt"]["perplexity"] for m in report["models"]]
    assert scores == [p["perplexity"] for p in points]

    def end_here(_config):
        raise Preempted

    monkeypatch.setattr(ladder, "evaluate_models", end_here)
    assert main([*arguments, "--ladder", "0.1"]) == 75
    assert main(["status", str(run_dir), "export.ladder=[0.1]", f"run_dir={run_dir}", "--tsv"]) == 0
    assert "export\tstopped\t" in capsys.readouterr().out


def test_a_rung_that_was_never_reached_stops_the_ladder_before_anything_is_exported(arguments, run_dir, capsys):
    assert main([*arguments, "--ladder", "0.1,0.7"]) == 2
    assert "sparsity 0.7: the run never got there; it has 0." in capsys.readouterr().err
    assert not (run_dir / "ladder").exists()
    with pytest.raises(UserError, match="between 0 and 1"):
        ladder.run(load_config(run_dir, ["export.ladder=[1.5]"]))


@pytest.mark.parametrize("mistake", ["evaluate.text=none.txt", "evaluate.window=100000", "evaluate.tasks=[none]"])
def test_a_mistake_in_what_is_evaluated_stops_the_ladder_too(arguments, run_dir, capsys, mistake):
    assert main([*arguments, "--ladder", "0.1", mistake]) == 2
    assert "nuteprune: " in capsys.readouterr().err
    assert not (run_dir / "ladder").exists()


def test_a_model_is_no_place_for_a_ladder(arguments, run_dir, tmp_path, capsys):
    assert main(["export", str(run_dir), f"export.output={tmp_path / 'small'}"]) == 0
    assert main([*arguments, "--ladder", "0.1", f"export.output={tmp_path / 'small'}"]) == 2
    assert "small is a model, no place for a ladder" in capsys.readouterr().err
    verify(tmp_path / "small")
    assert not (tmp_path / "small" / "0.1").exists()


@pytest.mark.parametrize("key", ["output", "models"])
def test_a_report_of_another_place_or_of_other_models_is_no_ladders(arguments, run_dir, tmp_path, capsys, key):
    own = "[a]" if key == "models" else tmp_path / "own"
    assert main([*arguments, "--ladder", "0.1", f"evaluate.{key}={own}"]) == 2
    assert f"evaluate.{key} has no place beside export.ladder" in capsys.readouterr().err
    assert not (run_dir / "ladder").exists()


def points(*pairs):
    return [{"parameters": size, "perplexity": perplexity} for size, perplexity in pairs]


def test_the_knee_is_where_quality_starts_to_fall_faster_than_size():
    curve = points((100, 10.0), (90, 10.5), (80, 11.0), (70, 12.0), (60, 20.0), (50, 60.0))
    assert ladder.knee(curve) == 3
    assert "| **" in ladder.table([p | {"sparsity": i / 10, "bytes": 1} for i, p in enumerate(curve)], 3)
    assert ladder.knee(points((100, 10.0), (90, 40.0), (50, 60.0))) is None  # falls faster at first: no knee
    assert ladder.knee(points((100, 10.0), (50, 60.0))) is None
    assert ladder.knee(points((100, 10.0), (90, None), (50, 60.0))) is None
