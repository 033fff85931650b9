"""Exported models in the hands of their users: public packages in a process where this project is not importable."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from exporting import (
    FAMILIES,
    FAMILY_SHAPES,
    SHAPES,
    asked,
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

pytestmark = pytest.mark.xdist_group("serving")

LONG = {"max_position_embeddings": 128, "rope_parameters": {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory, request):
    """What a process without this project made of each family in all shapes, and of a LLaMA with scaled RoPE.

    {(family, shape): (directory, logits of the masked model, what the process gave)}
    """
    made, wanted, jobs = {}, {}, []
    ids, long_ids = some_ids(), some_ids(length=100)
    families = asked(request)
    for family, shape in product((*families, *(("llama-long",) if "llama" in families else ())), SHAPES):
        tmp_path = tmp_path_factory.mktemp(f"{family}-{shape}")
        base = base_model("llama", **LONG) if family == "llama-long" else None
        # 40 is a multiple of the heads, so a LLaMA stays one; 37 makes a Mistral of it (see test_export).
        hidden = 40 if family == "llama" else 37
        config, model, gates, lora = trained(
            tmp_path, family.removesuffix("-long"), lambda s, k=shape, d=hidden: some_gates(s, k, hidden=d),
            base=base, **{"gates.shape": shape},
        )  # fmt: skip
        directory = export.run(config)
        checks = ["long"] if family == "llama-long" else ["lora"] if family in ("llama", "qwen2") else []
        checks += ["gguf"] if (family, shape) == ("llama", "uniform") else []
        jobs.append((str(directory), shape != "uniform", checks))
        wanted[family, shape] = masked_logits(model, gates, lora, long_ids if "long" in checks else ids)
        made[family, shape] = directory
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
    return {key: (directory, wanted[key], out[str(directory)]) for key, directory in made.items()}


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
