"""What a model's tokenizer puts around a text: how a sequence begins, and how a document ends.

A model is used on sequences that its tokenizer makes, so it is trained and scored on such sequences. docs/families.md
has a table of what each family was pretrained with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from transformers import PreTrainedTokenizerBase

DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Tokens behind which one document followed another in pretraining."""
_PROBE = "a"


@dataclass(frozen=True)
class SequenceForm:
    """Token ids around a text.

    Attributes:
        first: what every sequence begins with: `<bos>` where the tokenizer adds one, else nothing. Read, never scored.
        end: what stands between two documents; nothing where the tokenizer knows no end.
    """

    first: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, list[int]]:
        """The same as JSON holds it."""
        return {key: list(ids) for key, ids in asdict(self).items()}


def sequence_form(tokenizer: PreTrainedTokenizerBase) -> SequenceForm:
    """How this tokenizer's sequences begin and how its documents end."""
    return SequenceForm(first_tokens(tokenizer), document_end(tokenizer))


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text."""
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_PROBE)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def document_end(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The id behind a document.

    That is `eos_token`, but the one of an instruct tokenizer is often the end of a turn (`<|im_end|>`). So where
    `eos_token` is none of `DOCUMENT_ENDS`, the first of those that the vocabulary has as a special token.
    """
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = [special[token] for token in DOCUMENT_ENDS if token in special]
    if known and tokenizer.eos_token not in DOCUMENT_ENDS:
        return (known[0],)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
