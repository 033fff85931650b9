"""A smaller vocabulary: the tokens that a text uses, and what a byte-pair encoder needs to make them.

Vocabulary trimming (Ushio, Zhou and Camacho-Collados 2023) for the tokenizer.json of a BPE tokenizer. A token that is
gone is read as the smaller ones that merges made it of, so that any text can still be written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np

from nuteprune.errors import UserError

MULTIPLE = 64
"""Sizes of a vocabulary are multiples of this, which GPUs like."""
WHITE = frozenset(" \n\r\t▁ĠĊčĉ")
"""White space as tokenizers write it."""


def needed_tokens(content: Mapping, counts: np.ndarray, most: int) -> list[int]:
    """The ids that stay, ascending.

    These are all special and added tokens, the characters or bytes that everything is made of, white space, of which
    other text may have other runs, and, the most frequent first, the tokens of the text with those that merges make on
    the way to them.

    Args:
        content: tokenizer.json.
        counts: of each id, how often the text has it.
        most: at most so many, or the next lower multiple of `MULTIPLE`; 0: all that the text has, rounded up to one.

    Raises:
        UserError: no BPE tokenizer, or one that cannot do with so few.
    """
    model = content["model"]
    if model["type"] != "BPE" or not model["merges"]:
        raise UserError(f"its tokenizer is a {model['type']}, and only a BPE tokenizer's vocabulary can be trimmed")
    vocab: dict[str, int] = model["vocab"]
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    rank = {pair: number for number, pair in reversed([*enumerate(pairs)])}
    kept = {token["id"] for token in content["added_tokens"]} | set(_always(model))
    limit = most - most % MULTIPLE if most else len(vocab)
    if len(kept) > limit:
        raise UserError(
            f"--tokens {most} is too few: its special tokens, alphabet and white space alone are {len(kept)}"
        )
    seen = [(token, number) for token, number in vocab.items() if counts[number]]
    for token, number in sorted(seen, key=lambda pair: (-counts[pair[1]], pair[1])):
        on_the_way = {vocab[part] for part in _formed(token, rank) if part in vocab} | {number}
        if len(kept | on_the_way) > limit:
            break
        kept |= on_the_way
    spare = sorted({*vocab.values()} - kept)
    return sorted([*kept, *spare[: -len(kept) % MULTIPLE]])


def trimmed(content: Mapping, kept: list[int]) -> dict:
    """The tokenizer.json in which only these ids are left, numbered anew in the same order."""
    number = {old: new for new, old in enumerate(kept)}
    result = copy.deepcopy(dict(content)) | {"truncation": None, "padding": None}
    model = result["model"]
    model["vocab"] = {token: number[old] for token, old in model["vocab"].items() if old in number}
    left = model["vocab"]
    pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    model["merges"] = [merge for merge, (a, b) in pairs if a in left and b in left and a + b in left]
    for token in result["added_tokens"]:
        token["id"] = number[token["id"]]
    _renumber(result["post_processor"], number)
    return result


def _always(model: Mapping) -> Iterator[int]:
    """Ids of the bytes, or of all characters where there are no bytes to fall back on, and of white space."""
    for token, number in model["vocab"].items():
        byte = len(token) == 6 and token.startswith("<0x")
        alphabet = byte if model.get("byte_fallback") else len(token) == 1
        if alphabet or token == model.get("unk_token") or set(token) <= WHITE:
            yield number


def _formed(token: str, rank: Mapping[tuple[str, str], int]) -> set[str]:
    """All that BPE makes out of a token's characters, the characters too."""
    parts = list(token)
    found = set(parts)
    while len(parts) > 1:
        best, at = min((rank.get(pair, len(rank)), at) for at, pair in enumerate(pairwise(parts)))
        if best == len(rank):
            break
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
        found.add(parts[at])
    return found


def _renumber(processor: object, number: Mapping[int, int]) -> None:
    """Give the special tokens of a template their new ids."""
    if isinstance(processor, dict):
        if isinstance(processor.get("ids"), list):
            processor["ids"] = [number[old] for old in processor["ids"]]
        for part in processor.values():
            _renumber(part, number)
    elif isinstance(processor, list):
        for part in processor:
            _renumber(part, number)
