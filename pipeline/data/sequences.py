"""What a tokenizer puts around a text: how a sequence begins, and how a document ends; and ids beyond the model.

A model is used on sequences that its tokenizer makes, so it is trained and scored on such sequences.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from nuteprune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "a"


@dataclass(frozen=True)
class SequenceForm:
    """Token ids around a text.

    Attributes:
        first: what every sequence begins with: `<bos>` where the tokenizer adds one, else nothing. Read, never scored.
        end: what stands between two documents: `eos_token`, or nothing where the tokenizer has none.
    """

    first: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, list[int]]:
        """The same as JSON holds it."""
        return {key: list(ids) for key, ids in asdict(self).items()}


def sequence_form(tokenizer: PreTrainedTokenizerBase) -> SequenceForm:
    """How this tokenizer's sequences begin and how its documents end."""
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return SequenceForm(first_tokens(tokenizer), end)


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text."""
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_PROBE)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def check_ids(largest: int, vocab_size: int) -> None:
    """Raise `UserError` where the largest token id of a text is beyond the model's embedding."""
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {largest} but the model has {vocab_size} embeddings: take the added token that it "
            "stands for out of the text or, where the tokenizer is another model's, use the model's own"
        )
