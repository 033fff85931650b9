"""Tracker: what it writes is read back with the readers of TensorBoard, wandb and trackio, and line by line."""

import io
import json
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from nuteprune.__main__ import main
from nuteprune.config import load_config
from nuteprune.errors import UserError
from nuteprune.training.pictures import kept_picture
from nuteprune.training.tracking import PICTURE_WIDTH, Tracker, progress_bar


def tracker(run_dir, total, first_step=0, *overrides, stage="prune", is_main=True):
    config = load_config(None, [f"run_dir={run_dir}", "train.steps=4", *overrides])
    return Tracker(config, stage, total, first_step, is_main)


def events(run_dir):
    reader = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    reader.Reload()
    return reader


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_scalars_reach_tensorboard_and_jsonl(tmp_path):
    with tracker(tmp_path, 3) as own:
        for step in range(3):
            own.log(step, {"loss": 2.0 - step, "norm": torch.tensor(0.5)})
    assert lines(tmp_path)[1] == {"step": 1, "total": 3, "prune/loss": 1.0, "prune/norm": 0.5}
    assert [(s.step, s.value) for s in events(tmp_path).Scalars("prune/loss")] == [(0, 2.0), (1, 1.0), (2, 0.0)]


def test_what_one_watches_is_a_page_of_charts_and_a_group_of_its_own(tmp_path):
    names = ("loss", "kl_loss", "expected_sparsity", "target_sparsity", "tokens_per_s", "grad_norm")
    with tracker(tmp_path, 1) as own:
        own.log(0, dict.fromkeys(names, 1.0))
    read = events(tmp_path)
    assert {t for t in read.Tags()["scalars"] if t.startswith("prune/")} == {f"prune/{n}" for n in names[:-1]}
    assert read.Scalars("prune_details/grad_norm")[0].value == 1
    layout = layout_pb2.Layout.FromString(read.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts == {
        "loss": ["prune/loss$", "prune/kl_loss$"],
        "sparsity": ["prune/expected_sparsity$", "prune/target_sparsity$"],
        "tokens per second": ["prune/tokens_per_s$"],
    }


def test_nan_is_null_in_jsonl_so_that_every_line_is_strict_json(tmp_path):
    with tracker(tmp_path, 1) as own:
        own.log(0, {"loss": float("nan"), "norm": float("inf")})
    assert lines(tmp_path) == [{"step": 0, "total": 1, "prune/loss": None, "prune/norm": None}]


def test_resume_drops_what_is_done_again(tmp_path):
    with tracker(tmp_path, 6) as own:
        for step in range(5):
            own.log(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\0\0\0\n{"step": 5, "prune/lo')  # killed while writing
    time.sleep(1)  # TensorBoard orders the files of processes by the second they started in
    with tracker(tmp_path, 6, 2) as own:
        for step in range(2, 6):
            own.log(step, {"loss": 3.0})
    expected = [(0, 1.0), (1, 1.0), (2, 3.0), (3, 3.0), (4, 3.0), (5, 3.0)]
    assert [(line["step"], line["prune/loss"]) for line in lines(tmp_path)] == expected
    assert [(s.step, s.value) for s in events(tmp_path).Scalars("prune/loss")] == expected


def test_a_result_is_text_beside_the_curves_of_pruning(tmp_path):
    """Also where pruning goes on meanwhile."""
    with tracker(tmp_path, 4) as pruning:
        for step, perplexity in enumerate((9.0, 8.0)):
            pruning.log(step, {"loss": 1.0})
            with tracker(tmp_path, 1, None, stage="eval") as own:
                own.table("report", f"|perplexity|{perplexity}|", {"perplexity": perplexity})
        pruning.log(2, {"loss": 1.0})
    assert [line["step"] for line in lines(tmp_path) if "prune/loss" in line] == [0, 1, 2]
    assert [line for line in lines(tmp_path) if "prune/loss" not in line] == [
        {"step": 0, "total": 1, "eval/perplexity": 9.0}, {"step": 0, "total": 1, "eval/perplexity": 8.0}
    ]  # fmt: skip
    read = events(tmp_path)
    assert read.Tags()["scalars"] == ["prune/loss"]
    assert [s.step for s in read.Scalars("prune/loss")] == [0, 1, 2]
    assert b"|perplexity|8.0|" in read.Tensors("eval/report/text_summary")[-1].tensor_proto.string_val[0]


def test_pictures_settings_and_hparams(tmp_path):
    with tracker(tmp_path, 1) as own:
        own.log(0, {"loss": 1.0, "expected_sparsity": 0.5})
        own.picture(0, {"heads": torch.eye(3)})
        own.picture(0, {})
    read = events(tmp_path)
    (picture,) = read.Images("prune/kept")
    assert picture.width == 100 * PICTURE_WIDTH
    assert b"seed: 0" in read.Tensors("prune/config/text_summary")[0].tensor_proto.string_val[0]
    assert "_hparams_/session_start_info" in read.summary_metadata


def test_bars_show_the_kept_share_whatever_the_order_of_the_units():
    gates = torch.zeros(3, 40)
    gates[0], gates[1, :20] = 1, 1
    picture = kept_picture({"ffn": gates})
    assert picture == kept_picture({"ffn": gates[:, torch.randperm(40)]})
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).reshape(-1, 3)
    kept, removed = ((pixels == colour).all(1).sum() for colour in ((0x2B, 0x6C, 0xB0), (0xD9, 0xDE, 0xE3)))
    assert kept / (kept + removed) == pytest.approx(0.5, abs=0.03)


def test_progress_bar_shows_fields_and_goes_on_from_the_first_step(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # bars are for a terminal
    with progress_bar("prune", "step", 10, 4) as bar:
        bar.set_postfix({"loss": 2.34567, "sparsity": "3.1/4.0%"}, refresh=False)
        bar.update()
    shown = capsys.readouterr()
    assert "5/10" in shown.err
    assert "loss=2.35, sparsity=3.1/4.0%" in shown.err
    assert shown.out == ""
    with progress_bar("prune", "step", 10, shown=False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_other_ranks_write_nothing(tmp_path):
    with tracker(tmp_path / "run", 2, is_main=False) as own:
        own.log(0, {"loss": 1.0})
        own.picture(0, {"heads": torch.eye(2)})
        own.table("note", "text", {"perplexity": 1.0})
    assert not (tmp_path / "run").exists()


def test_nothing_but_jsonl_where_nothing_is_reported_to(tmp_path):
    with tracker(tmp_path, 1, 0, "tracking.report_to=[]") as own:
        own.log(0, {"loss": 1.0})
        own.picture(0, {"heads": torch.eye(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_unwritable_run_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the run directory .*Not a directory.*set run_dir") as error:
        tracker(tmp_path / "file" / "run", 1)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_place_that_is_not_installed_is_one_line_before_anything_is_loaded(settings, tmp_path, capsys):
    assert main(["prune", *settings, "tracking.report_to=[tensorboard,wandb]"]) == 2
    error = capsys.readouterr().err
    assert error == "nuteprune: tracking.report_to: wandb not installed: pip install wandb, or name another\n"
    assert not (tmp_path / "run").exists()


def test_a_place_that_is_not_known_is_one_line():
    with pytest.raises(UserError, match=r"tracking\.report_to: expected .* did you mean 'wandb'"):
        load_config(None, ["tracking.report_to=[wand]"])


def test_wandb_gets_the_curves_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with tracker(tmp_path, 2, 0, "tracking.report_to=[wandb]") as own:
        own.log(0, {"loss": 1.0})
        own.picture(0, {"heads": torch.eye(2)})
    written = [p.read_bytes() for p in tmp_path.glob("wandb/offline-run-*/*.wandb")]
    assert len(written) == 1
    assert b"prune/loss" in written[0]
    assert b"train.steps" in written[0]
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/prune/kept_*.png"))


def test_trackio_goes_on_with_the_run_of_the_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    if "trackio" in sys.modules:
        pytest.skip("trackio reads TRACKIO_DIR when it is imported, which has happened")
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    for step in range(2):
        with tracker(tmp_path / "run", 2, step, "tracking.report_to=[trackio]") as own:
            own.log(step, {"loss": 1.0 + step})
    (name,) = SQLiteStorage.get_runs("nuteprune")
    assert [m["prune/loss"] for m in SQLiteStorage.get_logs("nuteprune", name)] == [1.0, 2.0]
