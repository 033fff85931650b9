"""The peer's row: torch-pruning's own code takes the share of the decoder that was asked for, and LoRA learns."""

import argparse
import subprocess
import sys

import pytest
import torch
from tiny import QUIET

from nuteprune.bench import peers
from nuteprune.config import load_config
from nuteprune.errors import UserError
from nuteprune.evaluation.models import load_any

PACKAGE = "torch-pruning==1.6.1"


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """torch-pruning to be imported, as `make bench-peers` installs it."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, PACKAGE]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("torch-pruning cannot be downloaded")
    monkeypatch.syspath_prepend(tmp_path)


def test_the_peers_student(peer, model_dir, text_file):
    config = load_config(None, [
        f"model.path={model_dir}", f"data.source={text_file}", "data.seq_len=32", "train.steps=20",
        "train.batch_size=4", "sparsity.target=0.3",
    ])  # fmt: skip
    losses = []
    for rate in (1e-9, 1e-2):
        student, reached = peers.torch_pruning(config, rate)
        assert reached == pytest.approx(0.3, abs=0.02)
        intact, tokenizer, _ = load_any(str(model_dir), config.model)
        ids = torch.tensor([tokenizer(text_file.read_text())["input_ids"][:256]])
        with torch.no_grad():
            losses.append(peers.distillation(student(ids).logits, intact(ids).logits, ids))
    assert losses[1] < losses[0]
    with pytest.raises(UserError, match="FFN units alone cannot remove 99%"):
        peers.torch_pruning(load_config(config, ["sparsity.target=0.99"]), 1e-3)


def test_our_row_is_measured_anew(model_dir, text_file, tmp_path):
    """A run that is finished already would take no time."""
    args = argparse.Namespace(
        model=str(model_dir), train=text_file, test=[text_file], sparsity=0.3, steps=2, seed=0, blocks=1, out=tmp_path,
        set=["data.seq_len=32", "gates.importance_tokens=64", *QUIET], finetune=None,
    )  # fmt: skip
    written = set()
    for _ in range(2):
        peers.measure(args, 0.0)
        (result,) = tmp_path.rglob("pruned/manifest.json")
        written.add(result.stat().st_mtime_ns)
    assert len(written) == 2
