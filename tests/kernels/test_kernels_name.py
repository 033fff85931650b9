"""The folder `kernels` has the name of a Hugging Face package: transformers must find theirs, or none, but never ours.

Theirs comes as it is installed here, and said to be of a version that transformers accepts; the test of the wheel has
none.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from transformers.utils import is_kernels_available
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).resolve().parents[2]
BLOCK_TRITON = "import sys; sys.modules['triton'] = None\n"
LOAD_AND_RUN = """
import sys, tempfile, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
from nuteprune.kernels.api import masked_lora_linear
assert is_kernels_available() == (sys.argv[1] == "True")
config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(torch.arange(8)[None]).logits.shape == (1, 8, 32)
masked_lora_linear(torch.ones(2, 3), torch.ones(4, 3))
"""


def run(code: str, place: Path, available: bool, path: Path | None = None) -> None:
    """Run `code` in a directory, told whether their package counts as there; with `path` first on Python's path."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **({"PYTHONPATH": str(path)} if path else {})}
    command = [sys.executable, "-c", code, str(available)]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A directory with Hugging Face's package, said to be of the lowest version that transformers accepts."""
    shutil.copytree(distribution("kernels").locate_file("kernels"), tmp_path / "kernels")
    metadata = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    return tmp_path


def test_a_model_loads_and_runs_elsewhere_without_triton(tmp_path):
    run(BLOCK_TRITON + LOAD_AND_RUN, tmp_path, is_kernels_available())


def test_a_model_loads_and_runs_beside_their_package_where_our_folder_is(theirs):
    run(LOAD_AND_RUN, ROOT, True, theirs)
