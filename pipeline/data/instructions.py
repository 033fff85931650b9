"""Instruction records: read in three forms, worded as prompts and answers, packed whole into windows.

Shape letters: N windows, T tokens of a window.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from nuteprune.config import FinetuneConfig
from nuteprune.data.sequences import check_ids, first_tokens
from nuteprune.data.text import check_records, read_rows
from nuteprune.errors import UserError, first_line
from nuteprune.model.losses import IGNORE

log = logging.getLogger(__name__)

FORMS = {"alpaca": ("instruction", "output"), "messages": ("messages",), "completion": ("prompt", "completion")}
"""The keys that tell a record's form."""
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompts of Stanford Alpaca (Taori et al. 2023), which fine-tuned models are asked with again."""

Part = tuple[str, bool]
"""A piece of text, and whether it is an answer to be learned."""
Example = tuple[list[int], list[int]]
"""Token ids and labels of one record."""


def packed_windows(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.LongTensor:
    """The records of `config.data` as windows [N, 3, T]: token ids, labels, positions.

    Prompts and padding are labelled `IGNORE`. Positions start at 0 with each record, which is how transformers' masks
    know that attention may not cross from one record into another.

    Raises:
        UserError: an unreadable file, a record of no known form, with missing keys, an empty answer or more tokens
            than a window, a chat template that is asked for and missing, or a token id of `vocab_size` and more.
    """
    examples = [encode(parts, tokenizer) for parts in worded(config, tokenizer)]
    usable = _usable(config, examples)
    check_ids(max(max(ids) for ids, _ in usable), vocab_size)
    windows = (
        pack([len(ids) for ids, _ in usable], config.seq_len) if config.pack else [[i] for i in range(len(usable))]
    )
    # Not a token that was added behind the embedding's rows, as [PAD] often is. It is never learned from.
    fills = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    fill = next((token for token in fills if token is not None and token < vocab_size), 0)
    log.info("%d records in %d windows of %d tokens, %.0f%% filled", len(usable), len(windows), config.seq_len,
             100 * sum(len(ids) for ids, _ in usable) / (len(windows) * config.seq_len))  # fmt: skip
    return torch.stack([_window([usable[i] for i in members], config.seq_len, fill) for members in windows])


def worded(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Part]]:
    """Each record as alternating prompts and answers; an empty answer comes as one without text."""
    file = check_records(config.data)
    if config.template == "chat" and not tokenizer.chat_template:
        raise UserError("finetune.template=chat: the tokenizer has no chat template; use finetune.template=alpaca")
    chat = bool(tokenizer.chat_template) and config.template != "alpaca"
    words = None
    for number, row in enumerate(_records(file), 1):
        words = words or _wording(file, row, chat, tokenizer)
        try:
            yield words(row)
        except UserError as error:
            raise UserError(f"{file}: record {number} {error}") from None
    if words is None:
        raise UserError(f"{file} holds no records")


def _records(file: Path) -> Iterable[dict]:
    """The records of a file; those of one JSON array as they stand, where `datasets` makes text of mixed types."""
    if file.suffix == ".json":
        with suppress(ValueError, RecursionError):  # lines of JSON, or nothing readable
            if isinstance(rows := json.loads(file.read_bytes()), list) and all(isinstance(row, dict) for row in rows):
                return rows
    return read_rows(file, {})


def encode(parts: list[Part], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Token ids and labels of one record; each part is tokenised by itself, as it will be when a prompt is asked."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in parts:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += tokens
        labels += tokens if learned else [IGNORE] * len(tokens)
    return ids, labels


def pack(lengths: list[int], size: int) -> list[list[int]]:
    """Indices of the records of each window: longest first, each into the fullest window that has room for it."""
    windows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, window), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[index],))
        if place == len(room):
            windows.append([])
            free, window = size, len(windows) - 1
        else:
            free, window = room.pop(place)
        windows[window].append(index)
        insort(room, (free - lengths[index], window))
    return windows


def _window(examples: list[Example], size: int, fill: int) -> torch.LongTensor:
    padding = size - sum(len(ids) for ids, _ in examples)
    examples = [*examples, ([fill] * padding, [IGNORE] * padding)]
    ids = [token for tokens, _ in examples for token in tokens]
    # A record's first token has no context to be predicted from, least of all the record before it.
    labels = [label for _, labels in examples for label in [IGNORE, *labels[1:]][: len(labels)]]
    positions = [position for tokens, _ in examples for position in range(len(tokens))]
    return torch.tensor([ids, labels, positions])


def _usable(config: FinetuneConfig, examples: list[Example]) -> list[Example]:
    """The examples that can be learned from, with a word on the others; raises `UserError` where none is left."""
    empty = [n for n, (_, labels) in enumerate(examples, 1) if not any(label != IGNORE for label in labels[1:])]
    long = [n for n, (ids, _) in enumerate(examples, 1) if len(ids) > config.seq_len]
    out = {*empty, *long}
    left = [example for n, example in enumerate(examples, 1) if n not in out]
    if not left:
        raise UserError(f"{config.data}: no record has an answer and fits into {config.seq_len} tokens")
    for found, fault in ((empty, "have an empty answer"), (long, f"are longer than finetune.seq_len {config.seq_len}")):
        if found:
            log.warning("%s: %d of %d records are left out, which %s, first record %d", config.data, len(found),
                        len(examples), fault, found[0])  # fmt: skip
    return left


def _wording(file: Path, row: dict, chat: bool, tokenizer) -> Callable[[dict], list[Part]]:
    """How records like `row` are worded."""
    form = next((form for form, keys in FORMS.items() if all(row.get(key) is not None for key in keys)), None)
    if form is None:
        wanted = ", or ".join(" and ".join(keys) for keys in FORMS.values())
        given = ", ".join(key for key, value in row.items() if value is not None) or "none"
        raise UserError(f"{file}: record 1 must have the keys {wanted}; it has {given}")
    if form == "messages" and not chat:
        raise UserError(f"{file} holds chat messages, which need a chat template: the tokenizer has none in use")
    if form == "messages":
        return lambda row: _chat_parts(_messages(row), tokenizer)
    begin, end = _plain_ends(tokenizer)
    if form == "completion":
        return lambda row: [*begin, *_plain(_text(row, "prompt"), _text(row, "completion"), end)]
    if chat:
        return lambda row: _chat_parts(_alpaca_messages(row), tokenizer)
    return lambda row: [*begin, *_plain(_alpaca_prompt(row), _text(row, "output"), end)]


def _plain(prompt: str, answer: str, end: str) -> list[Part]:
    return [(prompt, False), (answer + end if answer.strip() else "", True)]


def _plain_ends(tokenizer) -> tuple[list[Part], str]:
    """What stands before a prompt (where the tokenizer itself puts it) and behind an answer.

    The first is a part of its own: behind a token in the same text some tokenizers (Mistral's) begin a word otherwise.
    """
    first = first_tokens(tokenizer)
    return [(tokenizer.decode(first), False)] if first else [], tokenizer.eos_token or ""


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"has no text in '{key}'")
    return value


def _alpaca_prompt(row: dict) -> str:
    wording = ALPACA_INPUT if row.get("input") else ALPACA
    return wording.format(instruction=_text(row, "instruction"), input=row.get("input"))


def _alpaca_messages(row: dict) -> list[dict]:
    question = _text(row, "instruction") + (f"\n\n{_text(row, 'input')}" if row.get("input") else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row, "output")}]


def _messages(row: dict) -> list[dict]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError("has no list in 'messages'")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError("has a message without text in 'role' and 'content'")
    if messages[-1]["role"] != "assistant":
        raise UserError("does not end with a message of the assistant")
    return messages


def _chat_parts(messages: list[dict], tokenizer) -> list[Part]:
    """Prompts and answers of a conversation: every message of the assistant is an answer."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not all(messages[number]["content"].strip() for number in answers):
        return [("", True)]
    parts, done = [], ""
    for number in answers:
        try:
            prompt = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        except (TemplateError, ValueError) as error:
            raise UserError(f"is refused by the chat template: {first_line(error)}") from None
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise UserError("is worded differently by the chat template once it goes on: give one answer per record")
        parts += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
        done = whole
    return parts
