"""The prepare stage: the text that later stages find, and damage that is found before a GPU is waited for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

from nuteprune.config import load_config
from nuteprune.data.prepared import TrainingText
from nuteprune.errors import UserError
from nuteprune.model.loading import read_base
from nuteprune.runs.checkpoint import write_manifest
from nuteprune.stages import export, prepare, prune


def text_of(config) -> TrainingText:
    return TrainingText(config.run_dir, config.data, read_base(config.model))


def test_prepared_text_is_what_would_be_packed(settings, text_file, monkeypatch):
    config = load_config(None, settings)
    directory = prepare.run(config)
    text = text_of(config)
    expected = text.pack()
    assert torch.equal(text.load(), expected)
    monkeypatch.setattr("nuteprune.data.text.packed_blocks", None)  # not called any more
    assert torch.equal(text.blocks(), expected)
    before = (directory / "manifest.json").stat().st_mtime_ns
    assert prepare.run(config) == directory
    assert (directory / "manifest.json").stat().st_mtime_ns == before


def test_a_text_that_was_written_to_since_is_told(settings, text_file, tmp_path, caplog):
    copy = tmp_path / "text.txt"
    shutil.copy(text_file, copy)
    config = load_config(None, [*settings, f"data.source={copy}"])
    prepare.run(config)
    before = text_of(config).load()
    assert "written to" not in caplog.text
    copy.write_text("brand new words " * 1000)
    assert torch.equal(text_of(config).load(), before)
    assert f"{copy} was written to since it was packed, and what was packed is trained on" in caplog.text


def test_pickled_weights_are_weights(settings, model_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_dir, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = load_config(None, [*settings, f"model.path={model}"])
    with pytest.raises(UserError, match="no weights"):
        prepare.run(config)
    torch.save(load_file(model_dir / "model.safetensors"), model / "pytorch_model.bin")
    assert prepare.run(config).is_dir()


def test_a_moved_run_exports_without_its_text(settings, text_file, tmp_path):
    copy = tmp_path / "text.txt"
    shutil.copy(text_file, copy)
    config = load_config(None, [*settings, f"data.source={copy}", "train.steps=4"])
    prepare.run(config)
    prune.run(config)
    copy.unlink()
    moved = shutil.move(config.run_dir, tmp_path / "moved")
    exported = export.run(load_config(moved))
    assert (exported / "model.safetensors").is_file()
    assert "| Data | `text.txt`, " in (exported / "README.md").read_text()  # not where that was


def test_other_settings_are_not_served_the_old_text(settings):
    config = load_config(None, settings)
    prepare.run(config)
    assert text_of(load_config(None, [*settings, "data.seq_len=16"])).load() is None


def test_text_of_another_tokenizer_at_the_same_path_is_packed_anew(settings, model_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    config = load_config(None, [*settings, f"model.path={model}"])
    prepare.run(config)
    file = model / "tokenizer.json"
    changed = json.loads(file.read_text())
    ids = changed["model"]["vocab"]
    one, other = sorted(ids, key=ids.get)[-2:]
    ids[one], ids[other] = ids[other], ids[one]
    file.write_text(json.dumps(changed))
    text = text_of(config)
    assert text.load() is None
    prepare.run(config)
    assert torch.equal(text.load(), text.pack())


def test_text_packed_before_sequences_had_a_form_of_their_own(settings):
    """It is used where it would be packed alike, and refused in one line where it lacks the tokenizer's first token."""
    config = load_config(None, settings)
    directory, text = prepare.run(config), text_of(config)
    tokenizer = text.base.tokenizer
    facts = json.loads((directory / "prepared.json").read_text())
    del facts["sequence"]
    (directory / "prepared.json").write_text(json.dumps(facts))
    write_manifest(directory)
    assert text.load() is not None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    with pytest.raises(UserError, match="remove it and run `nuteprune prepare` again"):
        text.blocks()


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
