"""Data: every source gives the same documents, every mistake one line, every rank count the same global batches."""

import json
import re

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nuteprune.config import DataConfig
from nuteprune.data.batches import BatchStream
from nuteprune.data.text import load_text, packed_blocks, text_tokens
from nuteprune.errors import UserError

DOCUMENTS = ["a b c", "b c d e", "a"]


def word_tokenizer(eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    vocab = {word: number for number, word in enumerate(["<unk>", "<eos>", "a", "b", "c", "d", "e"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="<unk>")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "train [1].jsonl", [{"text": text} for text in DOCUMENTS])


def config(source, seq_len=8, **kw):
    return DataConfig(source=str(source), documents=0, seq_len=seq_len, **kw)


def test_jsonl_and_its_limit(jsonl):
    assert load_text(str(jsonl), 0, "text")["text"] == DOCUMENTS
    assert load_text(str(jsonl), 2, "text")["text"] == DOCUMENTS[:2]


def test_another_column_beside_one_of_mixed_types(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "a", "meta": 1}, {"body": "b", "meta": "x"}])
    assert load_text(str(path), 0, "body")["text"] == ["a", "b"]


def test_each_line_of_jsonl_is_read_by_itself(tmp_path):
    """A key that comes late, texts that look like dates, a row without the column."""
    rows = [*[{"text": "a" * 1000}] * 11_000, {"text": "b", "source": {"page": 1}}, {"source": "web"}, {"text": "c"}]
    assert load_text(str(write_jsonl(tmp_path / "a.jsonl", rows)), 0, "text")["text"][-2:] == ["b", "c"]
    dates = [{"text": "2024-01-01T00:00:00"}, {"text": "2024-01-02T00:00:00"}]
    assert load_text(str(write_jsonl(tmp_path / "b.jsonl", dates)), 0, "text")["text"][0] == "2024-01-01T00:00:00"


def test_parquet_with_empty_and_null_documents(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", None, "", "b"], "n": [1, 2, 3, 4]}).to_parquet(tmp_path / "a.parquet")
    assert load_text(str(tmp_path / "a.parquet"), 0, "text")["text"] == ["a", "b"]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("a b\n\nc é 漢\n", encoding="utf-8")
    assert load_text(str(tmp_path / "a.txt"), 0, "body")["text"] == ["a b\n\nc é 漢\n"]


def test_the_mark_that_windows_puts_before_a_text_is_none_of_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa b\r\n")
    assert load_text(str(tmp_path / "a.txt"), 0, "text")["text"] == ["a b\n"]


def test_directory_is_read_in_sorted_order(tmp_path):
    (tmp_path / "c.txt").write_text("c")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b1"}, {"text": "b2"}])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.json").write_text('{"text": "a"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    assert load_text(str(tmp_path), 0, "text")["text"] == ["a", "b1", "b2", "c"]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('[{"text": "2024-01-01"}, {"text": "a", "more": 1}]', ["2024-01-01", "a"]),
        ('\ufeff{\n  "text": "a"\n}\n', ["a"]),
        ('{"text": "2024-01-01"}\n{"text": "b"}\n', ["2024-01-01", "b"]),
    ],
)
def test_a_json_file_is_a_list_an_object_or_lines(tmp_path, content, texts):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert load_text(str(tmp_path / "a.json"), 0, "text")["text"] == texts


def test_reading_local_files_shows_and_caches_nothing(jsonl, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    load_text(str(jsonl), 0, "text")
    assert capsys.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == [jsonl.name]


def test_c4_streams_the_first_documents(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": list("abcd"), "url": list("wxyz")}).to_iterable_dataset()
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: calls.append((a, kw)) or rows)
    assert load_text("c4", 3, "text")["text"] == ["a", "b", "c"]
    assert calls == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]


def test_blocks_are_documents_joined_by_eos(jsonl):
    blocks = packed_blocks(config(jsonl, seq_len=5), word_tokenizer(), vocab_size=7)
    assert blocks.dtype == torch.int64
    # a b c <eos> b | c d e <eos> a
    assert blocks.tolist() == [[2, 3, 4, 1, 3], [4, 5, 6, 1, 2]]


def test_blocks_without_eos_drop_the_remainder(jsonl):
    blocks = packed_blocks(config(jsonl, seq_len=3), word_tokenizer(eos=None), vocab_size=7)
    assert blocks.tolist() == [[2, 3, 4], [3, 4, 5]]


def test_text_tokens_is_the_whole_file_without_special_tokens(tmp_path, jsonl):
    (tmp_path / "a.txt").write_text("a b\n\nc d e")
    assert text_tokens(tmp_path / "a.txt", "text", word_tokenizer()).tolist() == [2, 3, 4, 5, 6]
    assert text_tokens(jsonl, "text", word_tokenizer()).tolist() == [2, 3, 4, 3, 4, 5, 6, 2]
    assert text_tokens(jsonl, "text", word_tokenizer(), documents=1).tolist() == [2, 3, 4]


def test_the_global_batch_is_the_same_for_any_number_of_ranks():
    blocks = torch.arange(10)[:, None]
    single = BatchStream(blocks, batch_size=4, seed=3)
    for world in (2, 4):
        ranks = [BatchStream(blocks, 4, 3, rank=rank, world=world) for rank in range(world)]
        for step in range(8):
            assert torch.equal(torch.cat([rank.batch(step) for rank in ranks]), single.batch(step))


def test_every_epoch_shows_every_block_once_in_another_order():
    stream = BatchStream(torch.arange(10)[:, None], batch_size=4, seed=0)
    assert stream.steps_per_epoch == 2.5
    shown = torch.cat([stream.batch(step) for step in range(5)]).flatten().tolist()
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(10))
    assert shown[:10] != shown[10:]
    assert shown != torch.cat([BatchStream(stream.blocks, 4, 1).batch(step) for step in range(5)]).flatten().tolist()


def test_going_on_in_mid_epoch_needs_only_the_step():
    blocks = torch.arange(7)[:, None]
    straight = BatchStream(blocks, 3, 5)
    wanted = [straight.batch(step) for step in range(9)]
    resumed = BatchStream(blocks, 3, 5)
    assert all(torch.equal(resumed.batch(step), wanted[step]) for step in (6, 7, 8, 2))


def test_a_batch_larger_than_the_data_goes_over_epochs():
    batch = BatchStream(torch.arange(3)[:, None], batch_size=7, seed=0).batch(0).flatten().tolist()
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


def test_ranks_that_do_not_divide_the_batch():
    with pytest.raises(UserError, match=r"train\.batch_size 16 .* 3 processes: make it a multiple of 3"):
        BatchStream(torch.zeros(4, 2), batch_size=16, seed=0, world=3)


def one_line(pattern):
    return pytest.raises(UserError, match=rf"(?-s:^[^\n]*{pattern}[^\n]*$)")


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("absent.jsonl", None, r"data\.source .* does not exist: give a file"),
        ("a.tsv", b"text\na\n", r"suffix '\.tsv' is not one of \.jsonl, \.json, \.txt, \.parquet, \.csv"),
        ("a.jsonl", b"", r"holds no text: give a file with at least one document"),
        ("a.txt", b"", r"holds no text"),
        ("a.jsonl", b"\n\n", r"holds no text"),
        ("a.jsonl", b'{"text": ""}\n', r"holds no text"),
        ("a.jsonl", b'{"body": "a", "n": 1}\n', r"no column 'text' .* its columns \(body, n\)"),
        ("a.jsonl", b'null\n{"text": "a"}\n', r"cannot read .*a\.jsonl as json \(line 1: no JSON object\): mend"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', r"\(line 2: 'utf-8' codec can't encode .*surrogates not"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": oops\n',
            r"cannot read .*a\.jsonl as json \(line 2: Expecting value.*mend",
        ),
        ("a.jsonl", b'{"text": 7}\n', r"row 1 holds no text in 'text' but int"),
        ("a.json", b'[{"text": "a"}, {"text": 7}]', r"row 2 holds no text in 'text' but int"),
        ("a.json", b'[null, {"text": "a"}]', r"cannot read .*a\.json as json \(row 1: no JSON object\): mend"),
        ("a.json", b'[{"text": "\\ud83d"}]', r"\(row 1: 'utf-8' codec can't encode .*surrogates not"),
        ("a.json", b'[{"text": "a"}, {"te', r"cannot read .*a\.json as json \(line 1: "),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "cut sh',
            r"cannot read .*a\.jsonl as json \(line 2: Unterminated string",
        ),
        ("a.txt", b"\xff\xfe", r"cannot read .*a\.txt as text \('utf-8' codec"),
        ("a.parquet", b"junk", r"cannot read .*a\.parquet as parquet"),
    ],
)
def test_mistakes_in_local_data_are_one_line(tmp_path, capsys, name, content, pattern):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with one_line(pattern):
        load_text(str(tmp_path / name), 0, "text")
    assert capsys.readouterr() == ("", "")


def test_a_parquet_file_without_rows_is_as_an_empty_file(tmp_path):
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with one_line(r"holds no text: give a file with at least one document"):
        load_text(str(tmp_path / "a.parquet"), 0, "text")
    datasets.Dataset.from_dict({"text": ["b"]}).to_parquet(tmp_path / "b.parquet")
    assert load_text(str(tmp_path), 0, "text")["text"] == ["b"]


def test_directory_without_text_files(tmp_path):
    (tmp_path / "a.tsv").write_text("a")
    with one_line(re.escape(f"no text files in {tmp_path}: put files there of these kinds: .jsonl")):
        load_text(str(tmp_path), 0, "text")


def test_text_shorter_than_a_block(jsonl):
    with one_line("has 10 tokens, less than one block of 16: give more text or lower data.seq_len"):
        packed_blocks(config(jsonl, seq_len=16), word_tokenizer(), vocab_size=7)


def test_tokenizer_of_another_model(jsonl):
    with one_line("the tokenizer gives id 6 but the model has 6 embeddings"):
        packed_blocks(config(jsonl), word_tokenizer(), vocab_size=6)


def test_c4_wants_a_number_of_documents():
    with one_line(r"c4 has 365 million documents: set data\.documents"):
        load_text("c4", 0, "text")


def test_hub_out_of_reach(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'allenai/c4'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with one_line(r"cannot read allenai/c4 from the hub \(Couldn't reach .*\): give a local path in data\.source"):
        load_text("c4", 3, "text")
