"""Text: reading through `datasets`, and packing to blocks.

Shape letters: N blocks, T tokens of a block, n tokens of a stream. torch and `datasets`, which take seconds to import,
are imported where they are used: a mistake in a path is told before.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from nuteprune.config import DataConfig
from nuteprune.data.sequences import check_ids, sequence_form
from nuteprune.errors import UserError, first_line

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PreTrainedTokenizerBase

C4 = "allenai/c4:en:train"
FORMATS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+){1,2}")
"""A data set of the hub: its name, its configuration where it has several, and its split."""
TOKENIZE_BATCH = 256
"""Documents handed to the fast tokenizer at once: enough to keep its threads busy, little memory."""
JOINT = "\n\n"
"""Between the documents of a text that is scored."""


def load_text(source: str, documents: int, text_field: str, setting: str = "data.source") -> datasets.Dataset:
    """The documents of a source, in order, in the column `text`; empty documents are left out.

    Local files are read as a stream, so nothing is written to the `datasets` cache in the user's home.

    Args:
        source: a file of `FORMATS`, also compressed, a directory of those or a pattern (`*`), read in sorted order; or
            a data set of the hub as NAME:SPLIT or NAME:CONFIGURATION:SPLIT, `c4` for allenai/c4:en:train. A .txt file
            is one document. Several stand between commas and are read one after the other, or with a weight behind
            each (`a.jsonl:3,b.jsonl:1`) in turns, three documents of the one for each of the other, until one ends.
        documents: at most this many documents; 0 takes all.
        text_field: column that holds the text in files that have columns.
        setting: where the source is named, for messages.

    Raises:
        UserError: nothing there, an unsupported suffix, an unreadable or malformed file, a missing text column, no
            text at all, or a hub that cannot be reached.
    """
    import datasets

    check_source(source, setting)
    parts = sources(source)
    streams = [_texts(place, documents, text_field, setting) for place, _ in parts]
    weights = [weight for _, weight in parts]
    texts = _in_turns(streams, weights) if all(weights) else itertools.chain(*streams)
    kept = list(itertools.islice((text for text in texts if text), documents or None))
    if not kept:
        raise UserError(f"{setting} '{source}' holds no text: give a file with at least one document")
    return datasets.Dataset.from_dict({"text": kept})


def sources(source: str) -> list[tuple[str, float]]:
    """The parts of a source and their weights, 0 where none is given; a path that is there is one part."""
    if Path(source).exists():
        return [(source, 0.0)]
    parts = [re.fullmatch(r"(.*?)(?::(\d*\.?\d+))?", part.strip()) for part in source.split(",")]
    return [(part[1], float(part[2] or 0)) for part in parts if part]


def check_source(source: str, setting: str = "data.source") -> None:
    """Raise `UserError` for a source of which a part is not there; of one on the hub only the form is looked at."""
    parts = sources(source)
    if len({weight > 0 for _, weight in parts}) > 1:
        raise UserError(f"{setting} '{source}': give each part a weight above 0 (a.jsonl:3,b.jsonl:1), or none")
    for place, _ in parts:
        if not on_hub(place):
            text_files(place, setting)


def check_records(path: str) -> Path:
    """The file of instruction records `finetune.data`; raises `UserError` where it is none."""
    file = Path(path)
    if not file.is_file() or kind_of(file) in ("", "text"):
        known = ", ".join(suffix for suffix, kind in FORMATS.items() if kind != "text")
        raise UserError(f"finetune.data '{path}': give an existing file of records ({known}, also compressed)")
    return file


def on_hub(place: str) -> bool:
    """Whether a part of a source is a data set of the hub."""
    return not Path(place).exists() and (place == "c4" or ON_HUB.fullmatch(place) is not None)


def text_files(place: str, setting: str = "data.source") -> list[Path]:
    """The files of a local part of a source in sorted order; other files in a directory are passed over."""
    path, supported = Path(place), f"{', '.join(FORMATS)}, also with {', '.join(COMPRESSED)} behind"
    if place and path.is_dir():
        files = sorted(file for file in path.rglob("*") if kind_of(file) and file.is_file())
        if not files:
            raise UserError(f"no text files in {place}: put files there of these kinds: {supported}")
        return files
    found = [path] if path.exists() else [Path(name) for name in glob.glob(place, recursive=True)]
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise UserError(
            f"{setting} '{place}' does not exist: give a file ({supported}), a directory, a pattern, or a data set of "
            "the hub as NAME:SPLIT (or c4)"
        )
    for file in files:
        if not kind_of(file):
            raise UserError(f"cannot read {file}: suffix '{file.suffix}' is not one of {supported}")
    return files


def kind_of(file: Path) -> str:
    """What `FORMATS` has for a file's suffix, behind which that of a compression may stand; empty for another."""
    return FORMATS.get(Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix, "")


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
    import numpy as np
    import torch

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
            f"data.source '{config.source}' has {len(stream)} tokens, less than one block of {config.seq_len}: "
            "give more text or lower data.seq_len"
        )
    check_ids(int(stream.max()), vocab_size)
    text = torch.from_numpy(stream[: count * length].astype(np.int64)).view(count, length)
    return torch.cat([torch.tensor(form.first, dtype=torch.int64).expand(count, -1), text], dim=1)


def text_tokens(
    path: str | Path, text_field: str, tokenizer: PreTrainedTokenizerBase, documents: int = 0,
    setting: str = "evaluate.text",
) -> torch.LongTensor:  # fmt: skip
    """The tokens `[n]` of a text source as one long stream without special tokens, as perplexity wants them.

    Documents (a .txt file is one) are joined by an empty line and tokenised as one string. Each window over them begins
    with the tokenizer's first tokens, which the windows add.

    Args:
        path: a source as in `load_text`.
        text_field: column that holds the text in JSONL and parquet files.
        tokenizer: tokenizer of the model to be scored.
        documents: at most this many documents; 0 takes all.
        setting: where the source is named, for messages.

    Raises:
        UserError: see `load_text`.
    """
    import torch

    text = JOINT.join(load_text(str(path), documents, text_field, setting)["text"])
    return torch.tensor(next(_token_ids([text], tokenizer)), dtype=torch.int64)


def _in_turns(streams: Sequence[Iterator[str]], weights: Sequence[float]) -> Iterator[str]:
    """Documents of several streams in the ratio of their weights, until the one whose turn it is has ended."""
    taken = [0] * len(streams)
    while True:
        turn = min(range(len(streams)), key=lambda i: (taken[i] + 1) / weights[i])
        taken[turn] += 1
        if (text := next(streams[turn], None)) is None:
            return
        yield text


def _texts(place: str, documents: int, text_field: str, setting: str) -> Iterator[str]:
    """The documents of one part of a source."""
    if on_hub(place):
        yield from _column(place, _hub_rows(place, documents, setting), text_field)
        return
    for file in text_files(place, setting):
        text_file = kind_of(file) == "text"
        # Windows begins a text file with a mark, which is no part of the text.
        options = {"sample_by": "document", "encoding": "utf-8-sig"} if text_file else {}
        yield from _column(str(file), read_rows(file, options), "text" if text_file else text_field)


def _hub_rows(place: str, documents: int, setting: str) -> Iterator[dict]:
    """The first rows of a data set of the hub, streamed."""
    import datasets

    from nuteprune.model.hub import unreachable

    if place == "c4" and documents == 0:
        raise UserError("c4 has 365 million documents: set data.documents to the number wanted")
    *name, split = (C4 if place == "c4" else place).split(":")
    why = unreachable()
    try:
        if why:
            raise ConnectionError(why)
        rows = datasets.load_dataset(*name, split=split, streaming=True)
        yield from rows.take(documents) if documents else rows
    # The hub's client lets through what its HTTP library raises, and that library changes with its version.
    except Exception as error:
        raise UserError(
            f"cannot read {name[0]} from the hub ({first_line(error)}): give a local path in {setting}"
        ) from error


def _column(place: str, rows: Iterator[dict], field: str) -> Iterator[str]:
    """The texts of rows; a null counts as an empty text, and so does a row behind the first without the column."""
    for number, row in enumerate(rows, 1):
        if number == 1 and field not in row:
            raise UserError(
                f"{place} has no column '{field}' in its first row: set data.text_field to one of its columns "
                f"({', '.join(row)})"
            )
        if not isinstance(text := row.get(field), str | None):
            raise UserError(f"{place}: row {number} holds no text in '{field}' but {type(text).__name__}")
        yield text or ""


def read_rows(file: Path, options: dict) -> Iterator[dict]:
    """The rows of one file, none of an empty one; `datasets` reads what is not JSON. Failures are told in one line."""
    if file.stat().st_size == 0:
        return
    import datasets
    from pyarrow import parquet

    kind = kind_of(file)
    with tempfile.TemporaryDirectory() as cache, _quiet_datasets():
        try:
            if kind == "json":
                yield from _json_rows(file) if ".json" in file.suffixes else _json_lines(file)
                return
            if file.suffix == ".parquet" and not parquet.read_metadata(file).num_rows:
                return  # `datasets` would take its batches to be of no row
            yield from datasets.load_dataset(
                kind,
                # A path is a pattern for `datasets`; brackets in a name are meant literally.
                data_files=glob.escape(str(file)),
                split="train",
                streaming=True,
                cache_dir=cache,
                **options,
            )
        except (ValueError, OSError, RecursionError, StopIteration, EOFError, zlib.error,
                datasets.exceptions.DatasetsError) as error:  # fmt: skip
            raise UserError(f"cannot read {file} as {kind} ({first_line(error)}): mend or remove the file") from error


def _opened(file: Path) -> AbstractContextManager:
    """A file's bytes, uncompressed."""
    import fsspec

    return fsspec.filesystem("file").open(str(file), "rb", compression="infer")


def _json_rows(file: Path) -> Iterator[dict]:
    """The objects of a .json file: those of a list, one alone, or one a line."""
    try:
        with _opened(file) as content:
            found = json.loads(content.read().decode("utf-8-sig"))
    except ValueError:
        yield from _json_lines(file)
        return
    for number, row in enumerate(found if isinstance(found, list) else [found], 1):
        yield _json_object(row, f"row {number}")


def _json_lines(file: Path) -> Iterator[dict]:
    """The objects of a .jsonl file. `datasets` would refuse a key that it first meets late, make dates of texts that
    look like one, and end the process at a null; raises `ValueError` with the line that is no JSON object."""
    with _opened(file) as lines:
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
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
