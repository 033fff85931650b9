"""WikiText-2 as papers score it: the text whatever form it comes in, windows, and the one first token."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import datasets
import pytest
import torch
from tiny import SENTENCES, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from nuteprune.config import DataConfig, EvaluateConfig
from nuteprune.errors import UserError
from nuteprune.evaluation import protocol
from nuteprune.evaluation.protocol import published_text, scored_texts

ROWS = ["", " = Title = \n", "", *[f" {sentence} \n" for sentence in SENTENCES for _ in range(2)], ""]
TEXT = "\n\n".join(ROWS)


def settings(*texts, **values) -> EvaluateConfig:
    return EvaluateConfig(text=list(map(str, texts)), protocol="published", **values)


def test_every_form_of_the_test_set_is_the_same_text(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(protocol, "WIKITEXT2_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    for name in ("original.txt", "wiki.test.raw"):  # as its publishers call it
        (tmp_path / name).write_text("".join(row or " \n" for row in ROWS))
    (tmp_path / "joined.txt").write_text(TEXT, newline="\r\n")
    datasets.Dataset.from_dict({"text": ROWS}).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_dict({"text": ROWS}).to_json(tmp_path / "rows.jsonl")
    for name in ("original.txt", "wiki.test.raw", "joined.txt", "rows.parquet", "rows.jsonl"):
        assert published_text(settings(tmp_path / name), "text") == ("WikiText-2", TEXT), name
    assert not caplog.text
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: {"text": ROWS} if split == "test" else None)
    assert published_text(settings(), "text") == ("WikiText-2", TEXT)


def test_windows_stand_side_by_side_over_one_first_token_and_the_text(tmp_path):
    (tmp_path / "joined.txt").write_text(TEXT)
    tokenizer = tiny_tokenizer()
    plain = tokenizer(TEXT).input_ids
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    # Whatever else is set: papers take all of it.
    published = settings(tmp_path / "joined.txt", window=64, blocks=2)
    found = scored_texts(published, DataConfig(), tokenizer)
    assert [(text.window, text.blocks) for text in found] == [(2048, 0), (128, 0)]
    assert all(torch.equal(text.tokens, torch.tensor([0, *plain])) for text in found)
    assert [text.first for text in found] == [(), ()]
    (text,) = scored_texts(replace(published, protocol="own"), DataConfig(), tokenizer)
    assert (text.window, text.blocks, text.first) == (64, 2, (0,))
    assert torch.equal(text.tokens, torch.tensor(plain))


def test_another_text_is_named_as_such(tmp_path, caplog):
    (tmp_path / "mine.txt").write_text("One.\n\nTwo.\n")
    assert published_text(settings(tmp_path / "mine.txt"), "text") == ("mine.txt (not WikiText-2)", "One.\n\nTwo.\n")
    assert "is not WikiText-2's raw test set" in caplog.text


MISTAKES = {
    "two texts": (["a.txt", "b.txt"], "scores one text"),
    "no file": (["none.txt"], "'none.txt' is no file"),
}


@pytest.mark.parametrize(("texts", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(texts, message):
    with pytest.raises(UserError, match=message):
        published_text(settings(*texts), "text")


def test_a_text_shorter_than_a_window_of_papers_is_one_line(tmp_path):
    (tmp_path / "short.txt").write_text("One.\n\nTwo.\n")
    told = r"^short.txt \(not WikiText-2\) has 10 tokens, .* of 2,048 .*: .*, or set evaluate.protocol=own and a lower"
    with pytest.raises(UserError, match=told):
        scored_texts(settings(tmp_path / "short.txt"), DataConfig(), tiny_tokenizer())


def test_a_text_in_another_encoding_is_one_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"cannot read .*latin\.txt as text \('utf-8' codec .*\): mend the file$"):
        published_text(settings(tmp_path / "latin.txt"), "text")


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"from the hub \(no\): name the file"):
        published_text(settings(), "text")
