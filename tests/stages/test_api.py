"""The Python API: the documented example runs, and settings may come in every form."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nuteprune
from nuteprune.config import load_config
from nuteprune.errors import UserError

ROOT = Path(__file__).parents[2]


def test_the_documented_example_runs(tmp_path, model_dir, text_file, monkeypatch, capsys):
    section = (ROOT / "docs/usage.md").read_text().split("## Python")[1]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    for name, source in (("smollm2-135m", model_dir), ("demo-text/train.txt", text_file),
                         ("demo-text/heldout.txt", text_file)):  # fmt: skip
        target = tmp_path / "models" / name
        target.parent.mkdir(exist_ok=True, parents=True)
        target.symlink_to(source)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "usage.md", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    assert re.search(r"^\d+\.\d% removed, logits \(1, \d+, 300\)$", printed, re.MULTILINE)
    assert re.search(r"^perplexity of heldout.txt x \d+\.\d\d$", printed, re.MULTILINE)
    assert (tmp_path / "runs/python/export/config.json").is_file()


def test_settings_in_every_form_give_the_same(tmp_path, settings):
    wanted = load_config(None, [*settings, "sparsity.target=0.3"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"run_dir: elsewhere\nmodel: {{path: {wanted.model.path}}}\n")
    rest = [s for s in settings if not s.startswith(("run_dir", "model.path"))] + ["sparsity.target=0.3"]
    nested = {"run_dir": wanted.run_dir, "model": {"path": wanted.model.path}}
    for form in (nested, tmp_path / "run", str(tmp_path / "run")):
        assert load_config(form, rest) == wanted
    assert load_config(wanted) == wanted
    assert load_config(wanted, ["seed=3"]).seed == 3
    with pytest.raises(UserError, match="settings: unknown key 'trian'"):
        nuteprune.prune({"trian": {}})


def test_importing_the_package_is_light_and_offers_its_calls():
    code = "import sys, nuteprune; print(dir(nuteprune), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out == f"{sorted({*nuteprune.__all__, '__version__'})} False\n"
    with pytest.raises(AttributeError, match="no attribute 'merge'"):
        nuteprune.merge  # noqa: B018  the access itself raises


@pytest.mark.parametrize("deepspeed", ["", "zero3"])
def test_a_notebook_goes_on_with_other_libraries(settings, model_dir, text_file, tmp_path, deepspeed):
    """Each call leaves the process as it found it; one process does all of it."""
    script, more = Path(__file__).with_name("notebook_alone.py"), [*settings, "train.steps=4", f"deepspeed={deepspeed}"]
    of_a_rank = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # which commands in tests before have set
    environment = {name: value for name, value in os.environ.items() if name not in of_a_rank}
    done = subprocess.run([sys.executable, script, tmp_path / "run", model_dir, text_file, *more], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    told = done.stdout.splitlines()
    assert [line for line in told if " changed " in line] == []
    assert told[-1:] == ["all went well"], done.stderr[-3000:]
    assert "accelerator" not in done.stderr
