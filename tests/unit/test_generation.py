"""What a model writes: prompts out of a text, loops, distinct 3-grams, agreement with the intact model."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import SENTENCES, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nuteprune.evaluation import generation
from nuteprune.evaluation.generation import Continued, continue_text, distinct_grams, is_loop, samples, score

PROSE = list(range(100, 164))


@pytest.fixture(scope="module")
def tokenizer():
    """The tiny tokenizer, which begins each sequence with `<bos>` here."""
    made = tiny_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    return made


@pytest.fixture(scope="module")
def text() -> str:
    return "\n\n".join("\n".join(SENTENCES[i : i + 4]) for i in range(0, len(SENTENCES), 4))


@pytest.fixture(scope="module")
def tokens(tokenizer, text) -> torch.LongTensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


LOOPS = {
    "prose": (PROSE, False),
    "one word for ever": ([*PROSE, *[7] * 12], True),
    "one word eleven times": ([*PROSE, *[7] * 11], False),
    "three words": ([*PROSE, *[1, 2, 3] * 4], True),
    "three words, cut within": ([*PROSE, 3, *[1, 2, 3] * 4, 1], True),
    "three words, but then prose": ([*[1, 2, 3] * 9, *PROSE], False),
    "a sentence of sixteen, three times": ([*PROSE, *list(range(16)) * 3], True),
    "a sentence of sixteen, twice": ([*PROSE, *list(range(16)) * 2], False),
    "all of it, three times": ([*list(range(21)) * 3], True),
    "all of it, but for a word": ([*list(range(21)) * 3][:-1], False),
    "nothing": ([], False),
}


@pytest.mark.parametrize(("ids", "loops"), LOOPS.values(), ids=LOOPS)
def test_a_loop_is_an_n_gram_three_times_at_the_end(ids, loops):
    assert is_loop(ids) == loops


def test_distinct_grams_are_counted():
    assert distinct_grams(PROSE) == 1
    assert distinct_grams([1, 2, 1, 2, 1, 2]) == 2 / 4
    assert distinct_grams([1, 2]) is None


def test_prompts_begin_as_the_tokenizer_does_where_a_paragraph_or_line_begins(tokenizer, text):
    prompts = generation._prompts(tokenizer, text, 8)
    assert prompts.shape == (8, 1 + generation.PROMPT_TOKENS)
    assert prompts[:, 0].tolist() == [0] * 8
    texts = [tokenizer.decode(ids[1:]) for ids in prompts]
    assert len(set(texts)) == 8
    assert all(any(sentence.startswith(text.split("\n")[0]) or text.startswith(sentence) for sentence in SENTENCES)
               for text in texts)  # fmt: skip
    # A text that is too short for so many gives fewer, one at least.
    assert len(generation._prompts(tokenizer, text[:800], 8)) == 3
    assert generation._prompts(tokenizer, text[:9], 8).shape[0] == 1


def test_prompts_begin_at_the_same_places_whatever_the_tokenizer(tokenizer, text):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"] = content["model"]["merges"][:5]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    # Text that is long in tokens of the one and not of the other stands at the end.
    text += "\n\n" + " ".join(SENTENCES[:30]).upper()
    whole, small = (
        [each.decode(ids[1:]) for ids in continue_text(tiny_model("llama"), each, torch.tensor(
            each(text, add_special_tokens=False).input_ids), 8).prompts]
        for each in (tokenizer, other)
    )  # fmt: skip
    assert len(whole) == len(small) == 8
    assert all(one.startswith(two) and len(two) < len(one) for one, two in zip(whole, small, strict=True))


def test_numbers_are_those_of_plain_generation(tokenizer, tokens):
    intact, other = tiny_model("llama"), tiny_model("llama", seed=1)
    written = [continue_text(model, tokenizer, tokens, 6) for model in (intact, other)]
    prompts = written[0].prompts
    agreed = total = 0
    for prompt, ids in zip(prompts, written[0].continuations, strict=True):
        grown = prompt
        with torch.no_grad():
            for token in ids:
                assert intact(grown[None]).logits[0, -1].argmax() == token
                agreed += int(other(grown[None]).logits[0, -1].argmax() == token)
                total += 1
                grown = torch.cat([grown, torch.tensor([token])])
            if len(ids) < generation.NEW_TOKENS:
                assert intact(grown[None]).logits[0, -1].argmax() == tokenizer.eos_token_id
    assert total > 6
    measured = score(other, written[1], written[0])
    assert measured["agreement"] == agreed / total
    assert score(intact, written[0], written[0])["agreement"] == 1
    assert measured["prompts"] == 6
    assert measured["loops"] == sum(map(is_loop, written[1].continuations)) / 6
    shown = samples(tokenizer, written[1])
    assert [sample["prompt"] for sample in shown] == [tokenizer.decode(ids[1:]) for ids in prompts[:3]]


def test_models_that_read_other_prompts_have_no_agreement(tokenizer, tokens):
    model = tiny_model("llama")
    own = continue_text(model, tokenizer, tokens, 2)
    assert "agreement" not in score(model, own, Continued(own.prompts + 1, own.continuations))
