"""A sequence is what the model's tokenizer makes: small tokenizers of each kind, and blocks that begin as they do."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nuteprune.config import DataConfig
from nuteprune.data.sequences import sequence_form
from nuteprune.data.text import packed_blocks

WORDS = ["<unk>", "a", "b", "c", "d", "e"]
KINDS = {
    # special tokens, eos_token, what is put before a text, what stands between documents
    "llama 1-2, mistral": (["<s>", "</s>"], "</s>", ["<s>"], "</s>"),
    "llama 3": (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|end_of_text|>",
                ["<|begin_of_text|>"], "<|end_of_text|>"),
    "llama 3 instruct": (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>",
                         ["<|begin_of_text|>"], "<|eot_id|>"),
    "gemma 3": (["<pad>", "<eos>", "<bos>", "<end_of_turn>"], "<eos>", ["<bos>"], "<eos>"),
    "smollm2, qwen": (["<|endoftext|>", "<|im_end|>"], "<|endoftext|>", [], "<|endoftext|>"),
    "smollm2, qwen instruct": (["<|endoftext|>", "<|im_end|>"], "<|im_end|>", [], "<|im_end|>"),
    "phi 3": (["<s>", "</s>", "<|endoftext|>", "<|end|>"], "<|endoftext|>", [], "<|endoftext|>"),
    "an end of its own": (["<stop>"], "<stop>", [], "<stop>"),
    "no end": ([], None, [], None),
}  # fmt: skip


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    special, eos, first, _ = KINDS[kind]
    vocab = {word: number for number, word in enumerate([*WORDS, *special])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    if first:
        backend.post_processor = TemplateProcessing(
            single=f"{' '.join(first)} $A", special_tokens=[(token, vocab[token]) for token in first]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=eos)


@pytest.mark.parametrize("kind", KINDS)
def test_form(kind):
    tokenizer = tokenizer_of(kind)
    _, _, first, end = KINDS[kind]
    first, end = (tokenizer.convert_tokens_to_ids(part) for part in (first, [end] if end else []))
    assert sequence_form(tokenizer) == {"first": first, "end": end}


def blocks_of(tmp_path, kind: str) -> list[list[str]]:
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b c", "d e a b", "c")))
    tokenizer = tokenizer_of(kind)
    blocks = packed_blocks(DataConfig(source=str(source), documents=0, seq_len=5), tokenizer, len(tokenizer))
    assert blocks.dtype == torch.int64
    return [tokenizer.convert_ids_to_tokens(block) for block in blocks.tolist()]


def test_every_block_begins_as_the_tokenizer_begins_a_sequence(tmp_path):
    assert blocks_of(tmp_path, "gemma 3") == [["<bos>", "a", "b", "c", "<eos>"], ["<bos>", "d", "e", "a", "b"]]


@pytest.mark.parametrize("kind", ["smollm2, qwen", "smollm2, qwen instruct"])
def test_without_a_first_token_blocks_are_the_text_alone(tmp_path, kind):
    """The stream of earlier versions, which put `eos_token` between documents and nothing before a block."""
    end = KINDS[kind][1]
    assert blocks_of(tmp_path, kind) == [["a", "b", "c", end, "d"], ["e", "a", "b", end, "c"]]
