"""The files of examples/ run as they stand, on a tiny model in place of theirs."""

import runpy
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = (
    "data.seq_len=32", "train.steps=2", "train.batch_size=2", "gates.importance_tokens=64", "tracking.progress=false",
    "gates.ffn_multiple=1", "evaluate.window=32", "evaluate.blocks=2", "finetune.steps=1", "finetune.seq_len=32",
    "finetune.batch_size=1", "export.gguf=f32",
)  # fmt: skip


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """Runs an example in an empty directory; returns the last line that it prints."""

    def run(name: str, *arguments) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments), *QUICK])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()[-1]

    return run


def test_a_model_of_the_hub_in_fifteen_lines(printed, model_dir, text_file):
    assert len((EXAMPLES / "hub_model.py").read_text().splitlines()) <= 15
    assert printed("hub_model.py", model_dir, f"data.source={text_file}", "export.gguf=").startswith("The river")


def test_a_sweep_draws_its_picture(printed, model_dir, text_file):
    assert Image.open(printed("sweep.py", model_dir, text_file)).size[0] > 100


def test_pruned_then_fine_tuned_then_for_llama_cpp(printed, model_dir, text_file, records, tmp_path):
    last = printed("finetune_to_gguf.py", model_dir, text_file, records)
    assert Path(last.removeprefix("llama-cli -m ")).read_bytes()[:4] == b"GGUF"
    assert (tmp_path / "runs/finetune-to-gguf/finetune/tuned").is_dir()
