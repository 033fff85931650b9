"""Mixtures of experts whose layers differ: pruned with teachers in a free shape, exported, and a rung of the ladder."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import QUIET, tiny_model
from transformers import AutoModelForCausalLM

from nuteprune.arch import read_spec
from nuteprune.config import load_config
from nuteprune.stages import export, prune

SIZES = {
    "qwen3_moe": {"moe_intermediate_size": 160, "num_experts": 8},
    "mixtral": {"intermediate_size": 160, "num_local_experts": 8},
}


@pytest.mark.parametrize(
    ("family", "shape", "units"),
    [("qwen3_moe", "per_layer_ffn", "[ffn,experts]"), ("mixtral", "per_layer", "[kv_groups,ffn,experts]")],
)
def test_run_export_and_rung(family, shape, units, tokenizer, text_file, tmp_path):
    base, run_dir = tmp_path / "base", tmp_path / "run"
    model = tiny_model(family, **SIZES[family])
    model.save_pretrained(base)
    chosen = read_spec(model.config).top_k
    tokenizer.save_pretrained(base)
    config = load_config(None, [
        f"run_dir={run_dir}", f"model.path={base}", f"data.source={text_file}", "data.seq_len=32", "train.steps=16",
        "train.batch_size=2", "gates.importance_tokens=128", f"gates.units={units}", f"gates.shape={shape}",
        "gates.ffn_multiple=1", "lora.targets=[q_proj,k_proj,v_proj,o_proj]", "sparsity.target=0.3",
        *QUIET,
    ])  # fmt: skip
    prune.run(config)
    layouts = []
    for sparsity in (0.0, 0.2):
        rung = [f"export.sparsity={sparsity}", f"export.output={tmp_path / f'export-{sparsity}'}"]
        directory = export.run(load_config(run_dir, rung))  # refuses where logits differ by more than 1e-3
        record = json.loads((directory / "nuteprune.json").read_text())
        assert abs(record["sparsity"] - (sparsity or 0.3)) <= 0.01
        tensors = load_file(directory / "model.safetensors")
        layouts.append([tuple(tensors[name].shape) for name in sorted(tensors) if name.endswith("experts.down_proj")])
        read = sum(t.numel() for t in tensors.values())
        for experts, hidden, width in layouts[-1]:
            assert experts >= chosen
            assert width % 8 == 0
            read -= 3 * (experts - chosen) * width * hidden
        assert record["read_for_a_token"] == read
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
        ids = torch.arange(3, 20)[None]
        cached, plain = (model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=use) for use in (True, False))
        assert torch.equal(cached, plain)
    assert len(set(layouts[0])) > 1, "all layers are alike"
    assert layouts[0] != layouts[1]
