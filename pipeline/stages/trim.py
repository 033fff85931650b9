"""The trim command: a copy of a model with only the tokens of a text in its vocabulary, to be pruned as any other."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.config import Config, load_config
from nuteprune.data.prepared import TrainingText
from nuteprune.data.sequences import first_tokens
from nuteprune.errors import UserError
from nuteprune.exporting.card import CARD, origin
from nuteprune.exporting.small import exported_dtype
from nuteprune.exporting.targets.stock import SHARD
from nuteprune.model.loading import Base, load_model, read_base
from nuteprune.model.vocabulary import needed_tokens, trimmed
from nuteprune.runs.checkpoint import MANIFEST, atomic_directory

log = logging.getLogger(__name__)

RECORD = "vocabulary.json"
"""Names the model that was trimmed, and of each row which of its rows it was."""
CHECKED = 64
"""Sequences of the text that both tokenizers have to write alike."""


def run(config: Config, output: str, tokens: int) -> str:
    """Write the model `config.model` with fewer tokens; returns what the command line prints.

    Args:
        config: the model, and the text that says which tokens stay.
        output: directory of the result.
        tokens: at most so many; 0: all that the text has.

    Raises:
        UserError: no such model or text, no BPE tokenizer, too few tokens, or files of something else in `output`.
    """
    base = read_base(config.model)
    target = check_output(output, base)
    tokenizer = base.tokenizer
    content = backend(tokenizer, base.path)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < base.spec.vocab]
    blocks = TrainingText("", config.data, base).pack()
    counts = np.bincount(blocks.flatten().numpy(), minlength=base.spec.vocab)
    try:
        kept = needed_tokens(content, counts, tokens)
    except UserError as error:
        raise UserError(f"model.path {base.path}: {error}") from None
    log.info("%d of %d tokens stay", len(kept), base.spec.vocab)
    stored = str(exported_dtype(base, "as_base")).removeprefix("torch.")
    model = load_model(replace(base, settings=load_config(config, [f"model.dtype={stored}"]).model))
    before = model.num_parameters()
    generation, model.generation_config = model.generation_config, GenerationConfig()
    shrink(model, kept)
    vars(model.config).pop("auto_map", None)  # names code that is not copied, and not needed
    with atomic_directory(target) as directory:
        write_tokenizer(tokenizer, trimmed(content, kept), kept, directory)
        check_tokenizer(directory, tokenizer, kept, blocks[:CHECKED])
        model.save_pretrained(directory, max_shard_size=SHARD)
        renumber(generation, kept).to_json_file(directory / "generation_config.json", use_diff=True)
        record = {"base": base.path, "text": config.data.source, "kept": kept}
        (directory / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        if facts := origin(base.path):
            (directory / CARD).write_text("\n".join(["---", *facts, "---", ""]), encoding="utf-8")
    split = split_share(counts, kept)
    return (
        f"trimmed model: {target}\n{base.spec.vocab:,} -> {len(kept):,} tokens, {before / 1e6:.1f}M -> "
        f"{model.num_parameters() / 1e6:.1f}M parameters; about {split:.2%} of the tokens of other text like this are "
        f"now split into smaller ones\nnext: nuteprune run {target}"
    )


def check_output(output: str, base: Base) -> Path:
    """The directory of the result; raises `UserError` where something else is there."""
    if not output:
        raise UserError("--out is missing: name a directory for the trimmed model")
    target = Path(output)
    if target.name in ("", ".."):
        raise UserError(f"--out {target} cannot be replaced as a whole: name a directory below it")
    ours = (target / MANIFEST).is_file() and (target / RECORD).is_file()
    if target.exists() and not ours and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out {target} holds files that are no earlier result of this command: choose another one")
    if target.resolve() == Path(base.path).resolve():
        raise UserError(f"--out {target} is the model itself: choose another directory")
    return target


def backend(tokenizer: PreTrainedTokenizerBase, path: str) -> dict:
    """The tokenizer.json of a tokenizer; raises `UserError` where it has none."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise UserError(f"model.path {path}: its tokenizer has no tokenizer.json: save it with a current transformers")
    return json.loads(fast.to_str())


def split_share(counts: np.ndarray, kept: list[int]) -> float:
    """How many tokens of other text of this kind are gone: those of this text, and its share of tokens that it has
    but once, which estimates what it has not seen (Good and Turing)."""
    gone = ~np.isin(np.arange(len(counts)), kept)
    return float((counts[gone].sum() + (counts[~gone] == 1).sum()) / counts.sum())


def shrink(model: PreTrainedModel, kept: list[int]) -> None:
    """Keep these rows of the token embedding and of the output head."""
    rows, weights = torch.tensor(kept), dict[Tensor, nn.Parameter]()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        old = layer.weight
        weights.setdefault(old, nn.Parameter(old.detach()[rows], requires_grad=False))
        layer.weight = weights[old]
    renumber(model.config, kept).vocab_size = len(kept)


def renumber(config: PreTrainedConfig | GenerationConfig, kept: list[int]) -> PreTrainedConfig | GenerationConfig:
    """Give the special tokens that a configuration names their new ids, in place; one that is gone is None."""
    number = {old: new for new, old in enumerate(kept)}
    for name, value in vars(config).items():
        if name.endswith("_token_id") and value is not None:
            several = isinstance(value, list)
            left = [number[each] for each in (value if several else [value]) if each in number]
            setattr(config, name, left if several else next(iter(left), None))
    return config


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, content: Mapping, kept: list[int], directory: Path) -> None:
    """Write a tokenizer with another tokenizer.json."""
    tokenizer.save_pretrained(directory)
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if old := settings.get("added_tokens_decoder"):
        number = {str(before): str(after) for after, before in enumerate(kept)}
        settings["added_tokens_decoder"] = {number[each]: token for each, token in old.items() if each in number}
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_tokenizer(directory: Path, before: PreTrainedTokenizerBase, kept: list[int], blocks: Tensor) -> None:
    """Raise `UserError` unless both tokenizers begin a sequence and write a text alike."""
    after = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    same = [kept[each] for each in first_tokens(after)] == list(first_tokens(before))
    for ids in blocks.tolist():
        text = before.decode(ids, skip_special_tokens=True)
        old, new = (each(text, add_special_tokens=False)["input_ids"] for each in (before, after))
        same &= before.decode(old) == before.decode([kept[each] for each in new]) == after.decode(new)
    if not same:
        raise UserError(
            f"model.path {before.name_or_path}: without the tokens that are gone its tokenizer writes other text"
        )
