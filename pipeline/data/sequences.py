"""What a model's tokenizer puts around a text: how a sequence begins, and how a document ends.

A model is used on sequences that its tokenizer makes, so it is trained and scored on such sequences.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_PROBE = "a"


def sequence_form(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids around a text, as JSON holds them.

    Returns:
        `first`: what every sequence begins with, `<bos>` where the tokenizer adds one; read, never scored. `end`: what
        stands between two documents, `eos_token`. Either is empty where the tokenizer has none.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return {"first": list(first_tokens(tokenizer)), "end": end}


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text."""
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_PROBE)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()
