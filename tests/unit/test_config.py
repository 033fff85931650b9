"""Configuration: layers of settings, the saved file reads back the same, help names every field."""

import dataclasses
import re
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path

import pytest

from nuteprune.__main__ import main
from nuteprune.config import STAGE_SECTIONS, Config, ConfigError, load_config
from nuteprune.model.losses import TERMS
from nuteprune.runs.rundir import save_config

ROOT = Path(__file__).parents[2]


def test_overrides_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("recipe: paper\ntrain: {lora_lr: 5e-4, batch_size: 8}\n")
    config = load_config(path, ["train.batch_size=2"])
    assert config.train.batch_size == 2
    assert config.train.lora_lr == 5e-4
    assert config.gates.units == ["heads", "ffn", "hidden"]
    assert load_config(None).train.batch_size == 16


@pytest.mark.parametrize("recipe", [p.stem for p in sorted((ROOT / "pipeline/recipes").glob("*.yaml"))])
def test_every_recipe_is_valid_and_the_saved_config_reads_back(recipe, tmp_path):
    config = load_config(None, [f"recipe={recipe}", "run_dir=x"])
    save_config(tmp_path / "config.yaml", config)
    assert load_config(tmp_path / "config.yaml") == replace(config, recipe="default")


def test_the_file_of_a_run_from_before_counts_importance_in_tokens_and_has_no_refit(tmp_path):
    path = tmp_path / "config.yaml"
    save_config(path, load_config(None, ["train.batch_size=4", "data.seq_len=256"]))
    text = path.read_text()
    text = text.replace("importance_tokens: 65536", "importance_batches: 6").replace("  refit: 112\n", "")
    text = text.replace("  prompts: 32\n", "  sample_prompt: The capital of France is\n")
    assert "sample_prompt" in text
    path.write_text(text)
    assert load_config(path).gates.importance_tokens == 6 * 4 * 256
    assert load_config(path).lora.refit == 0
    with pytest.raises(ConfigError, match="importance_tokens"):
        load_config(None, ["gates.importance_batches=6"])


def test_the_papers_recipe_is_the_papers():
    config = load_config(None, ["recipe=paper"])
    assert (config.data.source, config.data.documents, config.data.seq_len) == ("c4", 20_000, 512)
    assert (config.train.batch_size, config.train.epochs, config.train.lora_lr) == (16, 7, 1e-3)
    assert (config.gates.lr, config.gates.init, config.gates.init_drop_rate) == (0.1, "drop_rate", 0.01)
    assert (config.train.lora_schedule, config.train.grad_clip) == ("linear", 1.0)
    assert config.gates.clamp == pytest.approx(4.60517)
    assert (config.sparsity.target, config.sparsity.warmup) == (0.2, pytest.approx(4 / 7))
    assert (config.finetune.epochs, config.finetune.batch_size, config.finetune.lr) == (2, 16, 1e-4)
    assert not config.finetune.pack
    assert load_config(None, ["recipe=paper-masks"]).lora.targets == []
    assert (config.sparsity.constraint, config.sparsity.multiplier_lr) == ("lagrangian", 0.1)
    assert (config.lora.rank, config.lora.alpha) == (8, 8)
    assert (config.loss.layer, config.loss.layer_weight, config.loss.kl_weight) == ("raw", 0.9, 51.2)
    assert config.loss.temperature == pytest.approx(2 / 3)
    assert (config.teacher.mode, config.teacher.interval, config.teacher.lag) == ("numerous", 0.01, 10)


def test_a_wrong_list_or_section_is_one_line():
    with pytest.raises(ConfigError, match=r"lora\.targets: expected"):
        load_config(None, ["lora.targets=3"])
    with pytest.raises(ConfigError, match=r"'gates' is a section"):
        load_config(None, ["gates=uniform"])


@pytest.mark.parametrize("stage", STAGE_SECTIONS)
def test_help_names_every_field_of_the_stage_with_its_meaning(stage, capsys):
    with pytest.raises(SystemExit) as stop:
        main([stage, "--help"])
    assert stop.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    hints = typing.get_type_hints(Config)
    for section in STAGE_SECTIONS[stage]:
        for f in dataclasses.fields(hints[section]):
            assert f"{section}.{f.name} (" in text
            assert re.sub(r"\s+", " ", f.metadata["help"]) in text


def test_every_field_is_read_somewhere():
    source = "".join(p.read_text() for p in ROOT.glob("pipeline/**/*.py") if p.parent.name != "config")
    source += "".join(f".{name}_weight " for name in TERMS)  # which `losses` reads by its name
    hints = typing.get_type_hints(Config)
    for section in (s for s in hints if dataclasses.is_dataclass(hints[s])):
        for f in dataclasses.fields(hints[section]):
            assert re.search(rf"\.{f.name}\b", source), f"{section}.{f.name} is read nowhere"


def test_both_entry_points_answer():
    for command in ([sys.executable, "-m", "nuteprune", "--help"], ["nuteprune", "--help"]):
        if command[0] == "nuteprune":
            command[0] = str(Path(sys.executable).with_name("nuteprune"))
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "prune" in out
        assert "export" in out
        assert "evaluate" in out


def test_a_recipe_builds_on_another(tmp_path):
    (tmp_path / "mine.yaml").write_text("recipe: paper\ntrain: {batch_size: 8}\n")
    config = load_config(None, [f"recipe={tmp_path / 'mine.yaml'}"])
    paper = load_config(None, ["recipe=paper"])
    assert (config.train.batch_size, config.gates) == (8, paper.gates)
    (tmp_path / "mine.yaml").write_text(f"recipe: {tmp_path / 'mine.yaml'}\n")
    with pytest.raises(ConfigError, match="its own base"):
        load_config(None, [f"recipe={tmp_path / 'mine.yaml'}"])
