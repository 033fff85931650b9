"""Fine-tuning, and the recovery of a rung, on two ranks under ZeRO-3 are those of one process."""

import json
import shutil

import pytest
import ranks
from safetensors.torch import load_file

from nuteprune.__main__ import main

pytestmark = pytest.mark.xdist_group("ranks")


def test_two_ranks_learn_what_one_process_learns(run_dir, records, tmp_path):
    other = shutil.copytree(run_dir, tmp_path / "two")
    settings = [f"finetune.data={records}", "finetune.seq_len=64", "finetune.batch_size=4", "finetune.steps=6",
                "finetune.lr=1e-3", "finetune.distill=0.5"]  # fmt: skip
    assert main(["finetune", str(run_dir), *settings]) == 0
    ranks.run(["finetune", str(other), *settings, "deepspeed=zero3"], 2, tmp_path / "logs")
    compare(run_dir, other, "finetune", "finetune")


def test_two_ranks_recover_a_rung_as_one_process_does(run_dir, tmp_path):
    other = shutil.copytree(run_dir, tmp_path / "two")
    settings = ["recover.ladder=[0.2]", "recover.steps=6"]
    assert main(["recover", str(run_dir), *settings]) == 0
    ranks.run(["recover", str(other), *settings, "deepspeed=zero3"], 2, tmp_path / "logs")
    compare(run_dir, other, "recover", "recover-0.2")


def compare(one, two, stage, directory) -> None:
    """Losses of six steps to 1e-4, and the LoRA that they end with."""
    losses = [
        [json.loads(line)[f"{stage}/loss"] for line in (d / directory / "metrics.jsonl").read_text().splitlines()]
        for d in (one, two)
    ]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = (load_file(d / directory / "tuned/adapter/adapter_model.safetensors") for d in (one, two))
    assert all(two[key].sub(tensor).abs().max() < 1e-3 for key, tensor in one.items())
