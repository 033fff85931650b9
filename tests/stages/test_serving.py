"""Exported models in the hands of their users: public packages in a process where this project is not importable."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exporting import (
    FAMILIES,
    FAMILY_SHAPES,
    SHAPES,
    assert_close,
    base_model,
    loaded,
    masked_logits,
    some_gates,
    some_ids,
    trained,
)
from transformers import AutoConfig, AutoModelForCausalLM

from nuteprune.stages import export

pytestmark = pytest.mark.xdist_group("export")

LONG = {"max_position_embeddings": 128, "rope_parameters": {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}}  # fmt: skip


@pytest.fixture(scope="module")
def served(exports, tmp_path_factory):
    """What a process without this project made of each family in all shapes, and of a LLaMA with scaled RoPE.

    {(family, shape): (directory, logits of the masked model, what the process gave)}
    """
    ids, long_ids = some_ids(), some_ids(length=100)
    made = {key: (directory, wanted) for key, (directory, wanted, _) in exports.items()}
    own = (("llama", "uniform"), *(("llama-long", shape) for shape in SHAPES))
    for family, shape in own if own[0] in made else ():
        long = family == "llama-long"
        # 40 is a multiple of the heads, so a LLaMA stays one; 37 makes a Mistral of it (see test_export).
        config, model, gates, lora = trained(
            tmp_path_factory.mktemp(f"{family}-{shape}"), "llama",
            lambda s, k=shape, d=37 if long else 40: some_gates(s, k, hidden=d),
            base=base_model("llama", **LONG) if long else None, **{"gates.shape": shape},
        )  # fmt: skip
        made[family, shape] = (export.run(config), masked_logits(model, gates, lora, long_ids if long else ids))
    checks = {(family, shape): ["lora"] for family in ("llama", "qwen2") for shape in SHAPES}
    checks |= {("llama-long", shape): ["long"] for shape in SHAPES} | {("llama", "uniform"): ["lora", "gguf"]}
    jobs = [(str(made[key][0]), key[1] != "uniform", checks.get(key, [])) for key in made]
    folder = tmp_path_factory.mktemp("alone")
    torch.save((jobs, ids, long_ids), folder / "jobs.pt")
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("serve_alone.py")
    done = subprocess.run([sys.executable, "-I", script, folder / "jobs.pt", folder / "out.pt"], cwd=folder,
                          env=environment, capture_output=True, text=True, check=False,
                          stdin=subprocess.DEVNULL, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trust_remote_code" not in done.stdout + done.stderr  # nobody was asked
    out = torch.load(folder / "out.pt")
    return {key: (directory, wanted, out[str(directory)]) for key, (directory, wanted) in made.items()}


@pytest.mark.parametrize(("family", "shape"), FAMILY_SHAPES)
def test_logits_are_the_masked_models(served, family, shape):
    _, wanted, got = served[family, shape]
    assert_close(got["logits"], wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_rope_reaches_beyond_the_original_context(served, shape):
    _, wanted, got = served["llama-long", shape]
    assert wanted.shape[1] == 100 > LONG["rope_parameters"]["original_max_position_embeddings"]
    assert_close(got["long"], wanted)


def test_gguf_read_back_has_the_same_logits(served):
    _, wanted, got = served["llama", "uniform"]
    assert_close(got["gguf"], wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_exports_have_exactly_the_weights_of_a_stock_class(served, family):
    """What vLLM relies on: it picks its own model by `architectures` and fills it by these names and shapes."""
    directory, _, _ = served[family, "uniform"]
    config = AutoConfig.from_pretrained(directory)
    assert not hasattr(config, "auto_map")
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    assert config.architectures == [type(stock).__name__]
    ours = loaded(directory).state_dict()
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in stock.state_dict().items()}
