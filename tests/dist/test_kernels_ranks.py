"""Pruning in the triton kernels, under their interpreter: alike on one rank, on two under ZeRO-3, and in torch."""

import json
import os
import sys
from pathlib import Path

import pytest
import ranks
from safetensors.torch import load_file
from tiny import QUIET, SENTENCES, tiny_model

from nuteprune.config import load_config
from nuteprune.stages import prune

pytestmark = pytest.mark.xdist_group("ranks")

pytest.importorskip("triton", reason="triton has no build for this platform")


def in_triton(rank: int) -> None:
    """Choose the kernels before anything of them is imported; say at each step whether they were."""
    os.environ |= {"TRITON_INTERPRET": "1", "NUTEPRUNE_KERNELS": "triton"}
    original = prune.Pruning.train_step

    def noting(trainer):
        scalars = original(trainer)
        ran = "nuteprune.kernels.triton_kernels" in sys.modules and "nuteprune.kernels.ffn" in sys.modules
        Path(trainer.config.run_dir, f"rank-{rank}").write_text(str(ran))
        return scalars

    prune.Pruning.train_step = noting


def test_one_rank_and_two_under_zero3_in_the_kernels_follow_the_torch_path(tokenizer, tmp_path):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES[:16]))  # all of which is read before the first step, in the interpreter
    tiny_model("llama", num_hidden_layers=1).save_pretrained(model)
    tokenizer.save_pretrained(model)
    settings = [
        f"model.path={model}", f"data.source={text}", "data.seq_len=8", "train.steps=2", "train.batch_size=2",
        "train.micro_batch=1", "gates.init=drop_rate", "gates.shape=per_layer", "gates.ffn_multiple=1",
        "sparsity.target=0.3", "lora.targets=[q_proj,down_proj]", *QUIET,
    ]  # fmt: skip
    worlds = {"one": (1, []), "two": (2, ["deepspeed=zero3"])}
    for name, (size, own) in worlds.items():
        arguments = ["prune", *settings, *own, f"run_dir={tmp_path / name}"]
        ranks.run(arguments, size, tmp_path / "logs" / name, in_triton)
        assert [(tmp_path / name / f"rank-{rank}").read_text() for rank in range(size)] == ["True"] * size
    prune.run(load_config(None, [*settings, f"run_dir={tmp_path / 'torch'}"]))
    one, two, torch = (
        [json.loads(line)["prune/loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in (*worlds, "torch")
    )
    assert len(one) == 2
    assert two == pytest.approx(one, rel=1e-5)
    assert one == pytest.approx(torch, rel=1e-4)
    assert one != torch  # the other backend really ran
    one, two = (load_file(tmp_path / name / "pruned/adapter/adapter_model.safetensors") for name in worlds)
    assert one.keys() == two.keys()
    for key in (key for key in one if "lora_A" in key):
        # Their product: directions that weigh alike are told apart by rounding.
        updates = [own[key.replace("lora_A", "lora_B")] @ own[key] for own in (one, two)]
        assert updates[0].sub(updates[1]).abs().max() < 1e-5, key
