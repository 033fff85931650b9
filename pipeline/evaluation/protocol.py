"""What perplexity is measured on, and how: texts of one's own, or WikiText-2 as papers score it."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from nuteprune.config import DataConfig, EvaluateConfig
from nuteprune.data.sequences import first_tokens
from nuteprune.data.text import kind_of, read_rows, text_tokens
from nuteprune.errors import UserError, first_line
from nuteprune.runs.directories import DISTILLED, distill_directory, instruct_directory

log = logging.getLogger(__name__)

WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")
WIKITEXT2_SHA256 = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
"""Of the 4,358 rows of its raw test set, joined by blank lines."""
PUBLISHED_WINDOWS = (2048, 128)
"""Tokens: of SparseGPT, Wanda and SliceGPT; and of FLAP (`model.seqlen` in its main.py)."""


@dataclass(frozen=True)
class ScoredText:
    """A text as tokens `[n]`, and the windows it is scored in; see `measure.perplexity`."""

    name: str
    tokens: torch.LongTensor
    window: int
    blocks: int = 0
    first: tuple[int, ...] = ()


def scored_texts(settings: EvaluateConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[ScoredText]:
    """The texts for perplexity: `evaluate.text`, or else the text the run is trained on; or as papers do.

    Raises:
        UserError: see `load_text`; or as `published_text`, or of a text shorter than a window of papers.
    """
    if settings.protocol == "published":
        name, text = published_text(settings, data.text_field)
        # The first token stands once, before the whole text: so the papers' code calls the tokenizer.
        ids = [*first_tokens(tokenizer), *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        tokens = torch.tensor(ids, dtype=torch.int64)
        if len(tokens) < (longest := max(PUBLISHED_WINDOWS)):
            raise UserError(
                f"{name} has {len(tokens):,} tokens, less than one window of {longest:,} as papers have them: give "
                "WikiText-2's raw test set, or set evaluate.protocol=own and a lower evaluate.window"
            )
        return [ScoredText(f"{name}, windows of {window:,}", tokens, window) for window in PUBLISHED_WINDOWS]
    if settings.text:
        found = {name: text_tokens(text, data.text_field, tokenizer)
                 for name, text in zip(short_names(settings.text), settings.text, strict=True)}  # fmt: skip
    else:
        tokens = text_tokens(data.source, data.text_field, tokenizer, data.documents, "data.source")
        found = {Path(data.source).name: tokens}
    how = (settings.window, settings.blocks, first_tokens(tokenizer))
    return [ScoredText(name, tokens, *how) for name, tokens in found.items()]


def published_text(settings: EvaluateConfig, field: str) -> tuple[str, str]:
    """WikiText-2's raw test set, its rows joined by blank lines, and its name; empty rows are rows too.

    Raises:
        UserError: more than one text, one that cannot be read, or a hub that cannot be reached.
    """
    if len(settings.text) > 1:
        raise UserError("evaluate.protocol=published scores one text: name WikiText-2's raw test set in evaluate.text")
    text = _joined(Path(settings.text[0]), field) if settings.text else _of_the_hub()
    if hashlib.sha256(text.encode()).hexdigest() == WIKITEXT2_SHA256:
        return "WikiText-2", text
    log.warning("evaluate.text %s is not WikiText-2's raw test set: papers' numbers do not compare", settings.text)
    return f"{Path(settings.text[0]).name} (not WikiText-2)" if settings.text else "another WikiText-2", text


def short_names(paths: list[str]) -> list[str]:
    """The last part of each path, `distilled` or `instructed` for what `distill` and then `finetune` made, or the paths
    themselves where two share it."""
    made = {"distilled": distill_directory(Path()), "instructed": instruct_directory(Path())}
    named = {path: name for path in paths for name, own in made.items() if Path(path).match(str(own / DISTILLED))}
    short = [named.get(path, Path(path).name or path) for path in paths]
    return short if len(set(short)) == len(short) else paths


def _joined(file: Path, field: str) -> str:
    """The text of a file: JSON and parquet by their rows, others as they stand or in WikiText's form, a row a line."""
    if not file.is_file():
        raise UserError(f"evaluate.text '{file}' is no file: name WikiText-2's raw test set")
    if kind_of(file) not in ("", "text"):
        try:
            return "\n\n".join(row[field] for row in read_rows(file, {}))
        except (KeyError, TypeError):
            raise UserError(f"{file} has no text in a column '{field}': set data.text_field") from None
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {file} as text ({first_line(error)}): mend the file") from None
    if "\n\n" not in text:  # WikiText's own form: an empty line is a space
        text = "\n\n".join(line if line.strip() else "" for line in text.splitlines(keepends=True))
    return text


def _of_the_hub() -> str:
    try:
        return "\n\n".join(datasets.load_dataset(*WIKITEXT2, split="test")["text"])
    # The hub's client lets through what its HTTP library raises, and that library changes with its version.
    except Exception as error:
        raise UserError(
            f"cannot read {WIKITEXT2[0]} from the hub ({first_line(error)}): name the file of WikiText-2's raw test "
            "set in evaluate.text"
        ) from error
