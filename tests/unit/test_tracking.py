"""Tracker: what it writes is read back with TensorBoard's own reader and line by line."""

import json
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nuteprune.config import ConfigError, TrackingConfig
from nuteprune.training.tracking import PICTURE_HEIGHT, PICTURE_WIDTH, Tracker, heat_map

QUIET = TrackingConfig(progress=False)


def events(run_dir):
    reader = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    reader.Reload()
    return reader


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_scalars_reach_tensorboard_and_jsonl(tmp_path):
    with Tracker(tmp_path, QUIET, total_steps=3) as tracker:
        for step in range(3):
            tracker.log(step, {"loss": 2.0 - step, "norm": torch.tensor(0.5)})
    assert lines(tmp_path)[1] == {"step": 1, "total": 3, "prune/loss": 1.0, "prune/norm": 0.5}
    assert [(s.step, s.value) for s in events(tmp_path).Scalars("prune/loss")] == [(0, 2.0), (1, 1.0), (2, 0.0)]


def test_nan_is_null_in_jsonl_so_that_every_line_is_strict_json(tmp_path):
    with Tracker(tmp_path, QUIET, total_steps=1) as tracker:
        tracker.log(0, {"loss": float("nan"), "norm": float("inf")})
    assert lines(tmp_path) == [{"step": 0, "total": 1, "prune/loss": None, "prune/norm": None}]


def test_log_every_keeps_the_last_step(tmp_path):
    with Tracker(tmp_path, TrackingConfig(progress=False, log_every=4), total_steps=7) as tracker:
        for step in range(7):
            tracker.log(step, {"loss": step})
    assert [line["step"] for line in lines(tmp_path)] == [0, 4, 6]
    assert [s.step for s in events(tmp_path).Scalars("prune/loss")] == [0, 4, 6]


def test_resume_drops_what_is_done_again(tmp_path):
    with Tracker(tmp_path, QUIET, total_steps=6) as tracker:
        for step in range(5):
            tracker.log(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\0\0\0\n{"step": 5, "prune/lo')  # killed while writing
    time.sleep(1)  # TensorBoard orders the files of processes by the second they started in
    with Tracker(tmp_path, QUIET, total_steps=6, first_step=2) as tracker:
        for step in range(2, 6):
            tracker.log(step, {"loss": 3.0})
    expected = [(0, 1.0), (1, 1.0), (2, 3.0), (3, 3.0), (4, 3.0), (5, 3.0)]
    assert [(line["step"], line["prune/loss"]) for line in lines(tmp_path)] == expected
    assert [(s.step, s.value) for s in events(tmp_path).Scalars("prune/loss")] == expected


def test_a_later_stage_leaves_the_scalars_of_pruning_alone(tmp_path):
    with Tracker(tmp_path, QUIET, total_steps=2) as tracker:
        tracker.log(1, {"loss": 1.0})
    for perplexity in (9.0, 8.0):
        with Tracker(tmp_path, QUIET, total_steps=1, first_step=None, stage="eval") as tracker:
            tracker.log(0, {"perplexity": perplexity})
    pruning, evaluation = lines(tmp_path)
    assert pruning == {"step": 1, "total": 2, "prune/loss": 1.0}
    assert evaluation == {"step": 0, "total": 1, "eval/perplexity": 8.0}
    assert [s.step for s in events(tmp_path).Scalars("prune/loss")] == [1]


def test_pictures_texts_and_hparams(tmp_path):
    with Tracker(tmp_path, QUIET, total_steps=1, config_text="seed: 0") as tracker:
        tracker.images(0, {"heads": torch.eye(3)})
        tracker.hparams({"train.steps": 4, "gates.units": ["ffn"], "seed": 0}, {"perplexity": 12.5})
    read = events(tmp_path)
    picture = read.Images("prune/heads")[0]
    assert picture.width >= PICTURE_WIDTH
    assert picture.height >= PICTURE_HEIGHT
    assert b"seed: 0" in read.Tensors("prune/config/text_summary")[0].tensor_proto.string_val[0]
    assert read.Scalars("hparam/perplexity")[0].value == 12.5
    assert "_hparams_/session_start_info" in read.summary_metadata


@pytest.mark.parametrize("shape", [(1, 5), (30, 9), (2, 1536), (2, 11008)])
def test_heat_map_is_bright_where_kept(shape):
    values = torch.zeros(shape)
    values[:, : shape[1] // 2] = 1
    picture = heat_map(values)
    assert picture.shape[1] >= PICTURE_HEIGHT
    assert PICTURE_WIDTH <= picture.shape[2] <= 2048
    assert picture[1, 0, 0] > 0.8 > 0.2 > picture[1, -1, -1]


def test_progress_bar_shows_fields_and_goes_on_from_the_first_step(tmp_path, capsys):
    with Tracker(tmp_path, TrackingConfig(tensorboard=False), total_steps=10, first_step=4) as tracker:
        tracker.progress(4, {"loss": 2.34567, "sparsity": "3.1/4.0%", "teacher": "2.0%"})
    shown = capsys.readouterr()
    assert "5/10" in shown.err
    assert "loss=2.35, sparsity=3.1/4.0%, teacher=2.0%" in shown.err
    assert shown.out == ""
    assert not (tmp_path / "tensorboard").exists()


def test_other_ranks_write_nothing(tmp_path):
    with Tracker(tmp_path / "run", TrackingConfig(), total_steps=2, is_main=False, config_text="seed: 0") as tracker:
        tracker.log(0, {"loss": 1.0})
        tracker.progress(0, {"loss": 1.0})
        tracker.images(0, {"heads": torch.eye(2)})
        tracker.text("note", "text")
        tracker.hparams({"seed": 0}, {"perplexity": 1.0})
    assert not (tmp_path / "run").exists()


def test_unwritable_run_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write the run directory .*Not a directory.*set run_dir") as error:
        Tracker(tmp_path / "file" / "run", QUIET, total_steps=1)
    assert "\n" not in str(error.value)
