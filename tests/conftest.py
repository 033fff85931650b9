"""Fixtures over the tiny models of `tiny.py`: a tokenizer, a text, a saved model, a short run's settings."""

import json
import os
import shutil
import tempfile

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Modelling files of per_layer exports are copied there when they are loaded: not into the user's home.
if "HF_MODULES_CACHE" not in os.environ:
    modules = tempfile.TemporaryDirectory(prefix="nuteprune-tests-")
    os.environ["HF_MODULES_CACHE"] = modules.name

import pytest
from tiny import QUIET, SENTENCES, tiny_model, tiny_tokenizer

from nuteprune.config import load_config
from nuteprune.stages import export, prune
from nuteprune.training.signals import Preempted


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of `VOCAB` tokens."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """About 9,000 tokens of text."""
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("\n".join(SENTENCES * 3), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """40 instruction records, whose answers differ in length."""
    path = tmp_path_factory.mktemp("records") / "records.json"
    path.write_text(json.dumps([{"prompt": f"The {n}", "completion": " river" * (1 + n % 7)} for n in range(40)]))
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer):
    """Directory of a saved tiny LLaMA with grouped queries and its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, model_dir, text_file):
    """Directory of a finished prune run on the tiny model; not to be written to, see `run_dir`."""
    run = tmp_path_factory.mktemp("finished") / "run"
    prune.run(load_config(None, [*_short_run(run, model_dir, text_file), "sparsity.target=0.4"]))
    return run


@pytest.fixture
def run_dir(finished_run, tmp_path):
    """A copy of the finished run for a test to go on from."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def settings(model_dir, text_file, tmp_path):
    """Overrides of a short prune run on the tiny model."""
    return _short_run(tmp_path / "run", model_dir, text_file)


def _short_run(run, model_dir, text_file):
    return [
        f"run_dir={run}", f"model.path={model_dir}", f"data.source={text_file}", "data.seq_len=32",
        "train.steps=60", "train.batch_size=4", "gates.importance_tokens=256", *QUIET,
        "gates.ffn_multiple=1", "gates.hidden_multiple=1", "gates.shape=uniform",
    ]  # fmt: skip


@pytest.fixture
def exported(tokenizer, text_file, tmp_path):
    """Prunes and exports a tiny model of a family: `exported("gemma3", 0.4)`; returns the run's directory."""

    def make(family, sparsity, *more):
        tiny_model(family).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        settings = [f"run_dir={tmp_path / 'run'}", f"model.path={tmp_path / 'model'}", f"data.source={text_file}",
                    "data.seq_len=32", "train.steps=8", "train.batch_size=4", "gates.importance_tokens=256",
                    *QUIET, "gates.ffn_multiple=1", f"sparsity.target={sparsity}", *more]  # fmt: skip
        if "moe" in family:
            settings += ["lora.targets=[q_proj,v_proj]", "gates.shape=per_layer"]
        prune.run(load_config(None, settings))
        export.run(load_config(None, settings))
        return tmp_path / "run"

    return make


@pytest.fixture
def leave_at(monkeypatch):
    """A call that runs a stage, and tells it to leave at a step: `leave_at(Recovering, 7, recover.run, config)`."""

    def leave(stage, number, run, config):
        step = stage.train_step

        def told(trainer):
            if trainer.step == number:
                trainer.stop.received = "SIGTERM"
            return step(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(stage, "train_step", told)
            with pytest.raises(Preempted):
                run(config)

    return leave
