"""The paired forward and the prune stage compute the same with either backend."""

import json
from pathlib import Path

import pytest
from kernels_cases import DEVICE
from pair import IDS, Pair

from nuteprune.config import LossConfig, load_config
from nuteprune.stages import prune


def losses(settings, run_dir, backend, monkeypatch):
    monkeypatch.setenv("NUTEPRUNE_KERNELS", backend)
    short = ["train.steps=10", "data.seq_len=16", "train.batch_size=2", "gates.importance_tokens=1"]
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


# Norms over heads and over the whole width, weights with an offset, other activations, rotary positions of a part.
@pytest.mark.parametrize("name", ["gemma3", "mixtral", "qwen3", "olmo2", "phi3-partial", "granite"])
def test_a_family_has_the_same_losses_and_gradients_with_triton(name, monkeypatch):
    pytest.importorskip("triton", reason="triton has no build for this platform")
    pair, ids, found = Pair(name, device=DEVICE), IDS.to(DEVICE), {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("NUTEPRUNE_KERNELS", backend)
        losses = pair.model(ids, pair.student, pair.teacher, LossConfig())
        found[backend] = (losses, pair.gradients(losses.total))
    (losses, gradients), (ours, own) = found["torch"], found["triton"]
    assert ours.total.item() == pytest.approx(losses.total.item(), rel=1e-4)
    assert ours.terms.keys() == losses.terms.keys()
    for name, value in ours.terms.items():
        assert value.item() == pytest.approx(losses.terms[name].item(), rel=1e-4)
    assert any(not value.equal(want) for value, want in zip(own, gradients, strict=True)), "the same backend ran twice"
    for value, want in zip(own, gradients, strict=True):
        assert (value - want).abs().max() <= 1e-3 * want.abs().max() + 1e-7
