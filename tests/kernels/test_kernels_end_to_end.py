"""The prune stage computes the same run with either backend."""

import json
from pathlib import Path

import pytest

from nuteprune.config import load_config
from nuteprune.stages import prune


def losses(settings, run_dir, backend, monkeypatch):
    monkeypatch.setenv("NUTEPRUNE_KERNELS", backend)
    short = ["train.steps=10", "data.seq_len=16", "train.batch_size=2", "gates.importance_batches=1"]
    config = load_config(None, [*settings, *short, f"run_dir={run_dir}", "sparsity.target=0.4"])
    prune.run(config)
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [m["prune/loss"] for m in lines]


def test_losses_of_ten_steps_are_the_same_with_triton(settings, tmp_path, monkeypatch):
    torch_losses = losses(settings, tmp_path / "torch", "torch", monkeypatch)
    triton_losses = losses(settings, tmp_path / "triton", "triton", monkeypatch)
    assert len(torch_losses) == 10
    assert triton_losses == pytest.approx(torch_losses, rel=1e-4)
    assert triton_losses != torch_losses  # the other backend really ran
