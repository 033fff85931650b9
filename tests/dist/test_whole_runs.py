"""Every family goes all the way in the default shape: pruned (on two ranks as in one process), recovered, fine-tuned,
exported, evaluated."""

import json
import math

import pytest
import ranks
from test_engine import metrics, same_curve
from tiny import CONFIGS, QUIET, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from nuteprune.arch import read_spec
from nuteprune.config import load_config
from nuteprune.stages import evaluate, export, finetune, prune, recover

ON_TWO_RANKS = ("phi3", "olmo2", "gemma3", "qwen3_moe", "mixtral")
"""ZeRO-3 partitions modules of theirs that LLaMA, which test_engine.py has on two ranks, has not."""
FAMILIES = [
    pytest.param(name, marks=[pytest.mark.xdist_group("ranks")] if name in ON_TWO_RANKS else [])
    for name in CONFIGS if "-" not in name
]  # fmt: skip
SIZES = {
    "qwen3_moe": {"moe_intermediate_size": 128, "num_experts": 8},
    "mixtral": {"intermediate_size": 128, "num_local_experts": 8},
}
"""Widths of experts are multiples of 8."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_all_the_way(family, text_file, records, tmp_path):
    base, one, two = (tmp_path / name for name in ("base", "one", "two"))
    model = tiny_model(family, vocab_size=304, **SIZES.get(family, {}))  # more rows than the tokenizer has tokens
    model.save_pretrained(base)
    tiny_tokenizer(bos=True).save_pretrained(base)
    spec = read_spec(model.config)
    units = "[kv_groups,ffn,experts]" if spec.experts > 1 else "[heads,kv_groups,ffn]"
    overrides = [
        f"model.path={base}", f"data.source={text_file}", "data.seq_len=32", "train.steps=24", "train.batch_size=4",
        "train.micro_batch=1", "gates.importance_tokens=256", f"gates.units={units}", "gates.ffn_multiple=1",
        f"lora.targets=[{','.join(spec.lora_targets)}]", *QUIET, "lora.refit=4",
        # A target between two teachers (0.39, 0.40), so that rounding records no other one.
        # With the rank and rate of a real run rounding alone grows beyond what is compared here.
        "sparsity.target=0.395", "gates.lr=0.1", "train.lora_lr=3e-4", "lora.rank=8", "lora.alpha=8",
    ]  # fmt: skip
    prune.run(load_config(None, [*overrides, f"run_dir={one}"]))
    assert max(m["prune/teacher_sparsity"] for m in metrics(one)) > 0, "no snapshot ever taught"
    run = one
    if family in ON_TWO_RANKS:
        ranks.run(["prune", *overrides, f"run_dir={two}", "deepspeed=zero3"], 2, tmp_path / "logs")
        same_curve(two, one)
        run = two

    config = load_config(run, [
        "recover.ladder=[0.2]", "recover.steps=1", f"finetune.data={records}", "finetune.steps=1",
        "finetune.seq_len=32", "finetune.batch_size=1", f"evaluate.text=[{text_file}]",
        "evaluate.window=32", "evaluate.blocks=2", "evaluate.batch_sizes=[]", "evaluate.prompts=0", "deepspeed=",
    ])  # fmt: skip
    recover.run(config)
    finetune.run(config)
    directory = export.run(config)  # refuses where logits differ by more than 1e-3
    assert abs(json.loads((directory / "nuteprune.json").read_text())["sparsity"] - 0.395) <= 0.01
    assert type(AutoModelForCausalLM.from_pretrained(directory)).__name__.startswith("Ragged")
    for entry in evaluate.run(config)["models"]:
        assert entry["first_tokens"] == ["<bos>"]
        score = entry["perplexity"][text_file.name]
        assert math.isfinite(score["perplexity"])
        assert score["tokens"] == 2 * 31
