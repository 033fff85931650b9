"""A Hugging Face tokenizer as llama.cpp wants it in a GGUF file.

llama.cpp splits text by rules of its own, which a GGUF file names. Here they are found by what tokenizer.json does, not
by the model's name: a name that does not belong to it gives other tokens than the model was trained on.
"""

from __future__ import annotations

import json

import gguf
from transformers import PreTrainedTokenizerBase

from nuteprune.data.sequences import first_tokens
from nuteprune.errors import UserError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES, _BYTES_ONLY = ("ByteLevel", True), ("ByteLevel", False)
_PRE_TOKENIZERS = {
    ((_BYTES,), False): "gpt-2",
    (("digits", _BYTES), False): "smollm",
    ((rf"{_WORDS}|{_PUNCTUATION}", _BYTES_ONLY), False): "qwen2",
    ((rf"{_WORDS}{{1,3}}|{_PUNCTUATION}", _BYTES_ONLY), False): "smaug-bpe",
    ((rf"{_WORDS}{{1,3}}|{_PUNCTUATION}", _BYTES_ONLY), True): "llama-bpe",
    ((_CASED, _BYTES_ONLY), True): "tekken",
    ((_CASED, _BYTES_ONLY), False): "tekken",
}
"""llama.cpp's name by the steps of a pre-tokenizer and whether whole words of the vocabulary go before merges."""


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict:
    """`model` ("gpt2" or "llama"), `pre` (name of the pre-tokenizer, or None) and `json` (the file) of a tokenizer.

    Raises:
        UserError: llama.cpp has no rules for it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {}
    model = content.get("model", {})
    why = f"its tokenizer is a {model.get('type', type(tokenizer).__name__)}"
    if len(first_tokens(tokenizer)) > 1:
        why = "its tokenizer begins a sequence with several tokens"
    elif model.get("type") == "BPE" and model["merges"]:
        steps = _steps(content.get("pre_tokenizer"))
        if model.get("byte_fallback"):
            return {"model": "llama", "pre": None, "json": content}
        pre = _PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
        if pre and (content.get("normalizer") or {"type": "NFC"})["type"] == "NFC":
            return {"model": "gpt2", "pre": pre, "json": content}
        why = f"its pre-tokenizer is none of {', '.join(sorted(set(_PRE_TOKENIZERS.values())))}"
    raise UserError(f"no GGUF can be written of this model: {why}; export without export.gguf and use llama.cpp's "
                      "own converter if it knows the tokenizer")  # fmt: skip


def _steps(pre: dict | None) -> tuple:
    """The steps of a pre-tokenizer as keys of `_PRE_TOKENIZERS`."""
    if pre is None:
        return ()
    if pre["type"] == "Sequence":
        return tuple(step for part in pre["pretokenizers"] for step in _steps(part))
    if pre["type"] == "Digits" and pre["individual_digits"]:
        return ("digits",)
    if pre["type"] == "ByteLevel" and not pre["add_prefix_space"]:
        return ((pre["type"], pre["use_regex"]),)
    if pre["type"] == "Split" and pre["behavior"] == "Isolated" and not pre["invert"]:
        return (pre["pattern"].get("Regex"),)
    return (json.dumps(pre),)


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Add a tokenizer to a GGUF file whose model has `size` embeddings; errors as of `vocabulary`."""
    found = vocabulary(tokenizer)
    content = found["json"]
    tokens, types = _tokens(content, size)
    writer.add_tokenizer_model(found["model"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if found["model"] == "gpt2":
        writer.add_tokenizer_pre(found["pre"])
        writer.add_token_merges(merges)
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_puts_space_first(content))
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    first, last = first_tokens(tokenizer), tokenizer("a")["input_ids"][-1:]
    if first:  # llama.cpp puts its bos there, whatever the tokenizer calls that token
        ids["bos"] = first[0]
    for kind, token in ids.items():
        if token is not None and token < size:
            getattr(writer, f"add_{kind}_token_id")(token)
    writer.add_add_bos_token(bool(first))
    writer.add_add_eos_token(last == [ids["eos"]])
    if chat := tokenizer.chat_template:
        several = isinstance(chat, dict) and [{"name": name, "template": text} for name, text in chat.items()]
        writer.add_chat_template(several or chat)


def _tokens(content: dict, size: int) -> tuple[list[str], list[int]]:
    """Text and `gguf.TokenType` of each of `size` ids; embeddings without a token are unused ones."""
    model = content["model"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for text, i in model["vocab"].items():
        tokens[i], types[i] = text, int(gguf.TokenType.NORMAL)
        if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            types[i] = int(gguf.TokenType.BYTE)
    for token in content["added_tokens"]:
        if token["id"] < size:
            kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
            tokens[token["id"]], types[token["id"]] = token["content"], int(kind)
    if model.get("unk_token") in model["vocab"] and model.get("byte_fallback"):
        types[model["vocab"][model["unk_token"]]] = int(gguf.TokenType.UNKNOWN)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece's scores: the sooner a piece is merged the higher; pieces that no merge makes come last."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _puts_space_first(content: dict) -> bool:
    """Whether a text gets a space before its first word."""
    parts = [content.get("normalizer"), content.get("pre_tokenizer")]
    while parts:
        part = parts.pop() or {}
        parts += part.get("normalizers", []) + part.get("pretokenizers", [])
        if part.get("type") == "Prepend" or part.get("prepend_scheme", "never") != "never":
            return True
    return False
