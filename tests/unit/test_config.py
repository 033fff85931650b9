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
from nuteprune.config import STAGE_SECTIONS, Config, beyond_recipe, flatten, load_config, to_dict
from nuteprune.config.said import INSTEAD
from nuteprune.errors import UserError
from nuteprune.masks.schedule import Schedule
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


def test_a_section_without_lines_leaves_the_recipes(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("recipe: paper\ntrain:\n  # lora_lr: 1e-3\n")
    assert load_config(file) == load_config(None, ["recipe=paper"])


@pytest.mark.parametrize("recipe", [p.stem for p in sorted((ROOT / "pipeline/recipes").glob("*.yaml"))])
def test_every_recipe_is_valid_and_the_saved_config_reads_back(recipe, tmp_path):
    config = load_config(None, [f"recipe={recipe}", "run_dir=x"])
    save_config(tmp_path / "config.yaml", config)
    assert load_config(tmp_path / "config.yaml") == replace(config, recipe="default")


def test_every_stage_behind_pruning_says_what_it_reads_instead():
    assert {"prepare", "prune", *INSTEAD} == {*STAGE_SECTIONS}


def test_there_are_at_most_90_settings():
    assert len(flatten(to_dict(Config()))) <= 90, "a new setting takes the place of another one, see CONTRIBUTING.md"


def test_the_papers_recipe_is_the_papers():
    config = load_config(None, ["recipe=paper"])
    assert (config.data.source, config.data.documents, config.data.seq_len) == ("c4", 20_000, 512)
    assert (config.train.batch_size, config.train.epochs, config.train.lora_lr) == (16, 7, 1e-3)
    assert (config.gates.lr, config.gates.init) == (0.1, "drop_rate")
    assert Schedule(101, config.train, config.gates, config.sparsity).lora_share(60) == pytest.approx(1 - 59 / 100)
    assert config.gates.clamp == pytest.approx(4.60517)
    assert (config.sparsity.target, config.sparsity.warmup) == (0.2, pytest.approx(4 / 7))
    assert (config.finetune.epochs, config.finetune.batch_size, config.finetune.lr) == (2, 16, 1e-4)
    assert not config.finetune.pack
    assert load_config(None, ["recipe=paper-masks"]).lora.targets == []
    assert config.sparsity.constraint == "lagrangian"
    assert (config.lora.rank, config.lora.scaling) == (8, 1)
    assert (config.loss.layer_weight, config.loss.kl_weight) == (0.9, 51.2)
    assert config.loss.temperature == pytest.approx(2 / 3)
    assert (config.teacher.mode, config.teacher.interval, config.teacher.lag) == ("numerous", 0.01, 10)


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train: {steps: 8}\nseed: 1\ntrain: {batch_size: 4}\n")
    with pytest.raises(UserError, match=r"a\.yaml is not valid YAML \(line 3\): 'train' stands there again$"):
        load_config(file)


def test_a_wrong_list_or_section_is_one_line():
    with pytest.raises(UserError, match=r"lora\.targets: expected"):
        load_config(None, ["lora.targets=3"])
    with pytest.raises(UserError, match=r"'gates' is a section"):
        load_config(None, ["gates=uniform"])


def test_a_text_on_the_command_line_is_taken_as_it_stands(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for said, meant in (
        ("13", "13"), ("2026-02-30", "2026-02-30"), ("my #1 run", "my #1 run"), ("a: b", "a: b"), ("[a", "[a"),
        ("~/runs", "/home/me/runs"), ('"quoted"', "quoted"), ("", ""), ("null", ""),
    ):  # fmt: skip
        assert load_config(None, [f"run_dir={said}"]).run_dir == meant
    assert load_config(None, ["model.path=~/m", "evaluate.text=[~/a.txt,b.txt]"]).evaluate.text[0] == "/home/me/a.txt"


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


def test_both_entry_points_answer():
    for command in ([sys.executable, "-m", "nuteprune", "--help"], ["nuteprune", "--help"]):
        if command[0] == "nuteprune":
            command[0] = str(Path(sys.executable).with_name("nuteprune"))
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "prune" in out
        assert "export" in out
        assert "evaluate" in out


@pytest.mark.parametrize("units", ["attn_sublayers,ffn", "kv_groups,ffn"])
def test_what_goes_beyond_a_recipe_reads_back_to_the_same_settings(units):
    """As the planner writes it for jobs. Units that a recipe has by its shape are not those of another shape."""
    config = load_config(None, ["gates.shape=per_layer", f"gates.units=[{units}]"])
    assert load_config(beyond_recipe(config)) == config


def test_a_recipe_builds_on_another(tmp_path):
    (tmp_path / "mine.yaml").write_text("recipe: paper\ntrain: {batch_size: 8}\n")
    config = load_config(None, [f"recipe={tmp_path / 'mine.yaml'}"])
    paper = load_config(None, ["recipe=paper"])
    assert (config.train.batch_size, config.gates) == (8, paper.gates)
    (tmp_path / "mine.yaml").write_text(f"recipe: {tmp_path / 'mine.yaml'}\n")
    with pytest.raises(UserError, match="its own base"):
        load_config(None, [f"recipe={tmp_path / 'mine.yaml'}"])
