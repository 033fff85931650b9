"""Text: reading through `datasets`, and packing to blocks.

Shape letters: N blocks, T tokens of a block, n tokens of a stream. `datasets` takes half a second to import: what every
rank needs of a text is in `batches` and `sequences`.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from nuteprune.config import DataConfig
from nuteprune.data.sequences import check_ids, sequence_form
from nuteprune.errors import UserError, first_line
from nuteprune.model.hub import unreachable

C4 = "allenai/c4"
FORMATS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
TOKENIZE_BATCH = 256
"""Documents handed to the fast tokenizer at once: enough to keep its threads busy, little memory."""
JOINT = "\n\n"
"""Between the documents of a text that is scored."""


def load_text(source: str, documents: int, text_field: str) -> datasets.Dataset:
    """The documents of a source, in order, in the column `text`; empty documents are left out.

    Local files are read as a stream, so nothing is written to the `datasets` cache in the user's home.

    Args:
        source: `c4` (the hub's allenai/c4, English, train split), a .jsonl/.json/.txt/.parquet file, or a directory of
            those, read in sorted order. A .txt file is one document.
        documents: at most this many documents; 0 takes all.
        text_field: column that holds the text in JSONL and parquet files.

    Raises:
        UserError: nothing there, an unsupported suffix, an unreadable or malformed file, a missing text column, no
            text at all, or a hub that cannot be reached.
    """
    if source == "c4":
        texts = _c4_texts(documents)
    else:
        texts = (text for file in text_files(source) for text in _file_texts(file, text_field))
    kept = list(itertools.islice((text for text in texts if text), documents or None))
    if not kept:
        raise UserError(f"data source '{source}' holds no text: give a file with at least one document")
    return datasets.Dataset.from_dict({"text": kept})


def packed_blocks(config: DataConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.LongTensor:
    """All documents as one stream, cut into blocks; the remainder is dropped.

    Each block begins as the tokenizer begins a sequence, and documents are separated as it ends them (`sequence_form`).

    Args:
        config: source, number of documents, text column and block length.
        tokenizer: the model's.
        vocab_size: rows of the model's embedding.

    Returns:
        Token ids `[N, seq_len]`.

    Raises:
        UserError: see `load_text`; fewer tokens than one block; a token id the model has no embedding for.
    """
    documents, form = load_text(config.source, config.documents, config.text_field), sequence_form(tokenizer)
    pieces: list[np.ndarray] = []
    for ids in _token_ids(documents["text"], tokenizer):
        # int32 while collecting: half the memory of the result.
        pieces.append(np.asarray([*(form.end if pieces else ()), *ids], dtype=np.int32))
    stream = np.concatenate(pieces)
    length = config.seq_len - len(form.first)
    count = len(stream) // length
    if count == 0:
        raise UserError(
            f"data source '{config.source}' has {len(stream)} tokens, less than one block of {config.seq_len}: "
            "give more text or lower data.seq_len"
        )
    check_ids(int(stream.max()), vocab_size)
    text = torch.from_numpy(stream[: count * length].astype(np.int64)).view(count, length)
    return torch.cat([torch.tensor(form.first, dtype=torch.int64).expand(count, -1), text], dim=1)


def text_tokens(
    path: str | Path, text_field: str, tokenizer: PreTrainedTokenizerBase, documents: int = 0
) -> torch.LongTensor:
    """The tokens `[n]` of a text source as one long stream without special tokens, as perplexity wants them.

    Documents (a .txt file is one) are joined by an empty line and tokenised as one string. Each window over them begins
    with the tokenizer's first tokens, which the windows add.

    Args:
        path: a source as in `load_text`.
        text_field: column that holds the text in JSONL and parquet files.
        tokenizer: tokenizer of the model to be scored.
        documents: at most this many documents; 0 takes all.

    Raises:
        UserError: see `load_text`.
    """
    text = JOINT.join(load_text(str(path), documents, text_field)["text"])
    return torch.tensor(next(_token_ids([text], tokenizer)), dtype=torch.int64)


def _c4_texts(documents: int) -> Iterator[str]:
    """The first documents of C4's English train split, streamed from the hub."""
    if documents == 0:
        raise UserError("c4 has 365 million documents: set data.documents to the number wanted")
    if why := unreachable():
        raise UserError(f"cannot read {C4} from the hub ({why}): give a local path in data.source")
    try:
        rows = datasets.load_dataset(C4, "en", split="train", streaming=True)
        for row in rows.take(documents):
            yield row["text"]
    # The hub's client lets through what its HTTP library raises, and that library changes with its version.
    except Exception as error:
        raise UserError(
            f"cannot read {C4} from the hub ({first_line(error)}): give a local path in data.source"
        ) from error


def text_files(source: str) -> list[Path]:
    """The files of a local source in sorted order; other files in a directory are passed over."""
    path = Path(source)
    supported = ", ".join(FORMATS)
    if source and path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in FORMATS and file.is_file())
        if not files:
            raise UserError(f"no text files in {source}: put {supported} files there")
        return files
    if not path.is_file():
        raise UserError(f"data source '{source}' does not exist: give `c4`, a file ({supported}) or a directory")
    if path.suffix not in FORMATS:
        raise UserError(f"cannot read {source}: suffix '{path.suffix}' is not one of {supported}")
    return [path]


def _file_texts(file: Path, text_field: str) -> Iterator[str]:
    """The texts of one file; a null counts as an empty text, and so does a row behind the first without the column."""
    text_file = FORMATS[file.suffix] == "text"
    field = "text" if text_file else text_field
    # Windows begins a text file with a mark, which is no part of the text.
    options = {"sample_by": "document", "encoding": "utf-8-sig"} if text_file else {}
    for number, row in enumerate(read_rows(file, options), 1):
        if number == 1 and field not in row:
            raise UserError(
                f"{file} has no column '{field}' in its first row: set data.text_field to one of its columns "
                f"({', '.join(row)})"
            )
        if not isinstance(text := row.get(field), str | None):
            raise UserError(f"{file}: row {number} holds no text in '{field}' but {type(text).__name__}")
        yield text or ""


def read_rows(file: Path, options: dict) -> Iterator[dict]:
    """The rows of one file, none of an empty one; `datasets` reads what is not JSON. Failures are told in one line."""
    if file.stat().st_size == 0:
        return
    with tempfile.TemporaryDirectory() as cache, _quiet_datasets():
        try:
            if read := {".jsonl": _json_lines, ".json": _json_rows}.get(file.suffix):
                yield from read(file)
                return
            if file.suffix == ".parquet" and not parquet.read_metadata(file).num_rows:
                return  # `datasets` would take its batches to be of no row
            yield from datasets.load_dataset(
                FORMATS[file.suffix],
                # A path is a pattern for `datasets`; brackets in a name are meant literally.
                data_files=glob.escape(str(file)),
                split="train",
                streaming=True,
                cache_dir=cache,
                **options,
            )
        except (ValueError, OSError, RecursionError, StopIteration, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"cannot read {file} as {FORMATS[file.suffix]} ({first_line(error)}): mend or remove the file"
            ) from error


def _json_rows(file: Path) -> Iterator[dict]:
    """The objects of a .json file: those of a list, one alone, or one a line."""
    try:
        found = json.loads(file.read_bytes().decode("utf-8-sig"))
    except ValueError:
        yield from _json_lines(file)
        return
    for number, row in enumerate(found if isinstance(found, list) else [found], 1):
        yield _json_object(row, f"row {number}")


def _json_lines(file: Path) -> Iterator[dict]:
    """The objects of a .jsonl file. `datasets` would refuse a key that it first meets late, make dates of texts that
    look like one, and end the process at a null; raises `ValueError` with the line that is no JSON object."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {first_line(error)}") from None
            yield _json_object(row, f"line {number}")


def _json_object(row: object, place: str) -> dict:
    """`row`; raises `ValueError` where it is no object, or holds half of a surrogate pair, which is no text."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: no JSON object")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except ValueError as error:
        raise ValueError(f"{place}: {first_line(error)}") from None
    return row


def _token_ids(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each text without special tokens, tokenised a batch at a time."""
    for texts_batch in _batched(texts, TOKENIZE_BATCH):
        # verbose=False: documents longer than the model's context are cut into blocks later, no warning needed.
        yield from tokenizer(texts_batch, add_special_tokens=False, verbose=False)["input_ids"]


def _batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep `datasets` from logging what is about to be raised as one line."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
