"""The prepare stage: the text that later stages find, and damage that is found before a GPU is waited for."""

import json
import shutil

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from nuteprune.config import load_config
from nuteprune.data.prepared import TrainingText
from nuteprune.errors import UserError
from nuteprune.model.loading import read_base
from nuteprune.stages import prepare


def text_of(config) -> TrainingText:
    return TrainingText(config.run_dir, config.data, read_base(config.model))


def test_prepared_text_is_what_would_be_packed(settings, text_file, monkeypatch):
    config = load_config(None, settings)
    directory = prepare.run(config)
    text = text_of(config)
    expected = text.pack()
    assert torch.equal(text.load(), expected)
    monkeypatch.setattr("nuteprune.data.prepared.packed_blocks", None)  # not called any more
    assert torch.equal(text.blocks(), expected)
    before = (directory / "manifest.json").stat().st_mtime_ns
    assert prepare.run(config) == directory
    assert (directory / "manifest.json").stat().st_mtime_ns == before


def test_other_settings_are_not_served_the_old_text(settings):
    config = load_config(None, settings)
    prepare.run(config)
    assert text_of(load_config(None, [*settings, "data.seq_len=16"])).load() is None


def test_text_packed_without_the_tokenizers_first_token_is_packed_anew(settings):
    config = load_config(None, settings)
    prepare.run(config)
    text = text_of(config)
    assert text.load() is not None
    tokenizer = text.base.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    assert text.load() is None
    assert bool((text.blocks()[:, 0] == tokenizer.eos_token_id).all())


@pytest.mark.parametrize("damage", ["cut", "missing", "none"])
def test_damaged_weights_are_found(settings, model_dir, tmp_path, damage):
    copy = tmp_path / "model"
    shutil.copytree(model_dir, copy)
    weights = copy / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif damage == "missing":
        (copy / prepare.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model-2.safetensors"}}))
    else:
        weights.unlink()
    with pytest.raises(UserError, match=r"damaged|no weights"):
        prepare.run(load_config(None, [*settings, f"model.path={copy}"]))
