"""What a model writes: greedy continuations of prompts out of a text, and numbers that tell loops from prose.

Perplexity hides them: a pruned model may predict each next word fairly and still say the same three words for ever.

Shape letters: N prompts, P tokens of a prompt, T tokens of a continuation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data.sequences import first_tokens
from nuteprune.evaluation.measure import generate

PROMPT_TOKENS, NEW_TOKENS = 32, 64
PROMPT_ROOM = 256
"""Characters of text in which a prompt has room, whatever the tokenizer."""
SHOWN = 3
"""Continuations that people read."""
CYCLES, LOOP_TOKENS = 3, 12
"""A loop is an n-gram at least so many times in a row at the end, over at least so many tokens."""
BATCH = 4
"""Sequences whose full-vocabulary logits exist at once: 230 MB in fp32 for a vocabulary of 152k."""
_STARTS = (r"\n\s*\n\s*", r"\n\s*", r"\s+")
"""Where a prompt may begin, best first: behind a blank line, at a line's head, at a word."""


@dataclass(frozen=True)
class Continued:
    """Prompts `[N, P]`, and behind each its greedy continuation, which the end of sequence may cut short."""

    prompts: torch.LongTensor
    continuations: list[list[int]]


def continue_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: torch.LongTensor,
                  count: int) -> Continued:  # fmt: skip
    """Greedy continuations of prompts that are spread evenly over a text.

    Args:
        model: causal language model on its device.
        tokenizer: its tokenizer; prompts begin as it begins a sequence.
        tokens: the text as token ids `[n]`.
        count: how many; fewer where the text is short.
    """
    prompts = _prompts(tokenizer, tokenizer.decode(tokens), count)
    grown = generate(model, prompts, NEW_TOKENS)[:, prompts.shape[1] :].tolist()
    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    return Continued(prompts, [list(_until(ids, ends)) for ids in grown])


def score(model: PreTrainedModel, own: Continued, intact: Continued | None = None) -> dict:
    """Numbers of what a model wrote.

    Args:
        model: the model, on its device.
        own: what it wrote.
        intact: what the intact model wrote behind the same prompts; None where there is none.

    Returns:
        `prompts` N, `loops` (share of the continuations that end in a loop), `distinct` (mean share of different
        3-grams in a continuation: 1 - seq-rep-3 of Welleck et al. 2020), and with `intact`, where both models read the
        same prompt tokens, `agreement`: the share of the intact model's tokens that this one too ranks first, after the
        same tokens.
    """
    distinct = [share for ids in own.continuations if (share := distinct_grams(ids)) is not None]
    result = {
        "prompts": len(own.continuations),
        "loops": sum(map(is_loop, own.continuations)) / len(own.continuations),
        "distinct": sum(distinct) / len(distinct) if distinct else None,
    }
    if intact is not None and torch.equal(own.prompts, intact.prompts):
        result["agreement"] = agreement(model, intact)
    return result


def samples(tokenizer: PreTrainedTokenizerBase, written: Continued) -> list[dict]:
    """The first prompts and continuations as text, and whether each is a loop."""
    pairs = list(zip(written.prompts.tolist(), written.continuations, strict=True))[:SHOWN]
    return [
        {"prompt": tokenizer.decode(prompt, skip_special_tokens=True),
         "continuation": tokenizer.decode(ids, skip_special_tokens=True), "loops": is_loop(ids)}
        for prompt, ids in pairs
    ]  # fmt: skip


def is_loop(ids: list[int]) -> bool:
    """Whether a text ends in a loop: its last max(3n, 12) tokens repeat every n, for any n."""
    for cycle in range(1, len(ids) // CYCLES + 1):
        length = max(CYCLES * cycle, LOOP_TOKENS)
        end = ids[-length:]
        if len(end) == length and end[cycle:] == end[:-cycle]:
            return True
    return False


def distinct_grams(ids: list[int], n: int = 3) -> float | None:
    """Share of different n-grams among all of a text; None where it is shorter than one."""
    grams = list(zip(*(ids[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None


@torch.inference_mode()
def agreement(model: PreTrainedModel, intact: Continued) -> float | None:
    """Share of the continuations' tokens that a model ranks first after the prompt and the tokens before them."""
    longest = max(map(len, intact.continuations))
    if longest == 0:
        return None
    wanted = torch.tensor([ids + [-1] * (longest - len(ids)) for ids in intact.continuations])
    whole = torch.cat([intact.prompts, wanted.clamp(min=0)], dim=1)
    same = 0
    for ids, targets in zip(whole.split(BATCH), wanted.split(BATCH), strict=True):
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, -longest - 1 : -1]
        same += int((logits.argmax(-1).cpu() == targets).sum())
    return same / int((wanted >= 0).sum())


def _prompts(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> torch.LongTensor:
    """Prompts [N, P] spread evenly over a text's characters, each where a paragraph, a line or a word begins nearby."""
    count = min(count, max(1, len(text) // PROMPT_ROOM))
    part, first, found = len(text) // count, list(first_tokens(tokenizer)), []
    near = min(part, 4 * PROMPT_ROOM)
    for begin in range(0, count * part, part):
        # A start is looked for in the first of a part's characters; the prompt itself may go on behind them.
        found.append(first + _head(tokenizer, text[begin : begin + near + PROMPT_ROOM], near))
    shortest = min(map(len, found))
    return torch.tensor([ids[:shortest] for ids in found])


def _head(tokenizer: PreTrainedTokenizerBase, text: str, near: int) -> list[int]:
    """Tokens from the best start in a text's first `near` characters that leaves enough, else from its head."""
    for pattern in _STARTS:
        if start := re.search(pattern, text[:near]):
            ids = tokenizer(text[start.end() :], add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]
            if len(ids) == PROMPT_TOKENS:
                return ids
    return tokenizer(text, add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]


def _until(ids: list[int], ends: set[int]) -> Iterator[int]:
    """Token ids up to the end of the sequence, without it."""
    for token in ids:
        if token in ends:
            return
        yield token
