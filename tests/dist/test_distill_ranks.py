"""Distillation on several ranks is that of one process, whoever holds the optimizer's state and the teacher."""

import json
import shutil

import pytest
import ranks
from safetensors.torch import load_file

from nuteprune.__main__ import main
from nuteprune.config import load_config
from nuteprune.stages import export

pytestmark = pytest.mark.xdist_group("ranks")
SETTINGS = ["distill.steps=6"]


@pytest.fixture
def one(run_dir):
    """A run whose export was distilled by one process."""
    export.run(load_config(run_dir, ["tracking.progress=false"]))
    before = shutil.copytree(run_dir, run_dir.with_name("before"))
    assert main(["distill", str(run_dir), *SETTINGS]) == 0
    return before, run_dir


@pytest.mark.parametrize(("count", "deepspeed"), [(2, ""), (4, "zero2"), (2, "zero3")])
def test_ranks_learn_what_one_process_learns(count, deepspeed, one, tmp_path):
    before, alone = one
    several = shutil.copytree(before, tmp_path / "several")
    ranks.run(["distill", str(several), *SETTINGS, f"deepspeed={deepspeed}"], count, tmp_path / "logs")
    losses = [[json.loads(line)["distill/loss"] for line in (run / "distill/metrics.jsonl").read_text().splitlines()]
              for run in (alone, several)]  # fmt: skip
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    first, second = (load_file(run / "distill/model/model.safetensors") for run in (alone, several))
    assert all(second[key].sub(tensor).abs().max() < 1e-3 for key, tensor in first.items())


def test_a_checkpoint_of_two_ranks_goes_on_in_one(one, tmp_path):
    before, alone = one
    several = shutil.copytree(before, tmp_path / "several")
    begun = [*SETTINGS, "checkpoint.every=2"]
    ranks.run(["distill", str(several), *begun, "deepspeed=zero2"], 2, tmp_path / "logs")
    shutil.rmtree(several / "distill/model")
    checkpoints = sorted((several / "distill/checkpoints").glob("step-*"))
    assert [path.name for path in checkpoints][-1] == "step-00000004"
    assert main(["distill", str(several), *begun]) == 0
    first, second = (load_file(run / "distill/model/model.safetensors") for run in (alone, several))
    assert all(second[key].sub(tensor).abs().max() < 1e-3 for key, tensor in first.items())
