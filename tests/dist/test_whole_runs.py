"""A whole run of every family: two ranks under ZeRO-3 follow one process, a checkpoint goes on, and the export holds."""

import json

import pytest
import ranks
from test_engine import from_checkpoint, metrics, same_curve
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from nuteprune.arch import read_spec
from nuteprune.config import load_config
from nuteprune.stages import export, prune

FAMILIES = ("granite", "smollm3", "phi3", "olmo2", "olmo3", "gemma3", "qwen3_moe", "mixtral")
"""LLaMA, of which Mistral and the Qwens differ in no module, is in test_engine.py."""
SIZES = {
    "qwen3_moe": {"moe_intermediate_size": 128, "num_experts": 8},
    "mixtral": {"intermediate_size": 128, "num_local_experts": 8},
}
"""Widths of experts are multiples of 8."""


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        *((family, "uniform") for family in FAMILIES), ("qwen3_moe", "per_layer"), ("mixtral", "per_layer_ffn"),
        ("granite", "per_layer_ffn"),
    ],
)  # fmt: skip
def test_two_ranks_resume_and_export(family, shape, tokenizer, text_file, tmp_path):
    base = tmp_path / "base"
    model = tiny_model(family, **SIZES.get(family, {}))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    spec = read_spec(model.config)
    refit = 4 * (family == "granite" and shape == "per_layer_ffn")
    units = "[kv_groups,ffn,experts]" if spec.experts > 1 else "[heads,kv_groups,ffn]"
    overrides = [
        f"model.path={base}", f"data.source={text_file}", "data.seq_len=32", "train.steps=50", "train.batch_size=4",
        "train.micro_batch=1", "gates.importance_tokens=256", f"gates.units={units}", f"lora.targets=[{','.join(spec.lora_targets)}]",
        f"gates.shape={shape}", "gates.ffn_multiple=1", "sparsity.target=0.395", "tracking.progress=false",
        # A target between two teachers (0.39, 0.40), so that rounding records no other one.
        # With the steps and the rank of a real run rounding alone grows beyond what is compared here.
        "gates.lr=0.1", "train.lora_lr=3e-4", "lora.rank=8", "lora.alpha=8", "checkpoint.every=20",
        f"lora.refit={refit}", "checkpoint.keep=9", "export.check_tokens=128",
    ]  # fmt: skip
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    prune.run(load_config(None, [*overrides, f"run_dir={one}"]))
    taught = [m["prune/teacher_sparsity"] for m in metrics(one)]
    assert max(taught) > 0, "no snapshot ever taught"
    ranks.run(["prune", *overrides, f"run_dir={two}", "deepspeed=zero3"], 2, tmp_path / "logs")
    same_curve(two, one)
    from_checkpoint(two, resumed, 20)
    config = load_config(None, [*overrides, f"run_dir={resumed}"])
    prune.run(config)
    same_curve(resumed, one)
    directory = export.run(config)  # refuses where logits differ by more than 1e-3
    assert abs(json.loads((directory / "nuteprune.json").read_text())["sparsity"] - 0.395) <= 0.01
    small = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert (type(small) is type(model)) == (shape == "uniform")
