"""The package's name is also that of a Hugging Face package: transformers must not stumble over ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK_TRITON = "import sys; sys.modules['triton'] = None\n"
LOAD_AND_RUN = """
import sys, tempfile, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
assert not is_kernels_available()
import nuteprune.kernels.api as kernels
assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(torch.arange(8)[None]).logits.shape == (1, 8, 32)
kernels.masked_lora_linear(torch.ones(2, 3), torch.ones(4, 3))
"""


@pytest.mark.parametrize("block", ["", BLOCK_TRITON], ids=["triton", "no triton"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["from the root", "from elsewhere"])
def test_transformers_model_loads_and_runs(block, elsewhere, tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    command = [sys.executable, "-c", block + LOAD_AND_RUN, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path if elsewhere else ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_is_light():
    code = "import kernels, sys; assert not {'torch', 'triton'} & set(sys.modules); assert not hasattr(kernels, 'x')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
