"""What comes from others is data: nothing of it runs, leaves its directory, or steers a terminal (docs/security.md)."""

import json
import logging
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
import yaml
from exporting import base_model, loaded, on_disk, some_gates, some_ids, trained
from safetensors import SafetensorError
from safetensors.torch import load_file

from nuteprune.config import ExportConfig, ModelConfig, load_config
from nuteprune.errors import UserError
from nuteprune.evaluation import page, pictures, report
from nuteprune.evaluation.models import load_any
from nuteprune.evaluation.tasks import load_tasks
from nuteprune.exporting.card import base_licence
from nuteprune.exporting.publish import push
from nuteprune.model.loading import load_model, read_base
from nuteprune.runs import jobs
from nuteprune.runs.checkpoint import CheckpointError, inside, verify, write_atomic, write_manifest
from nuteprune.runs.fingerprint import fingerprint
from nuteprune.runs.log import PlainFormatter
from nuteprune.runs.rundir import load_run, save_config
from nuteprune.runs.snapshot_files import load_snapshots
from nuteprune.runs.words import code, markdown_words, plain
from nuteprune.stages import export, status
from nuteprune.training.tracking import Tracker

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(dtype="float32")
TRUST = "evaluate.trust_remote_code=true"


@pytest.fixture
def marker(tmp_path):
    """A file that foreign code writes where it runs."""
    return tmp_path / "it-ran"


@pytest.fixture
def model_dir(tmp_path):
    """A LLaMA with its tokenizer."""
    on_disk(tmp_path, base_model("llama"))
    return tmp_path / "base"


def with_code(directory: Path, marker: Path, file: str = "config.json", key: str = "AutoModelForCausalLM") -> None:
    """Make a model's directory ask for a Python file of its own, which writes the marker as soon as it is imported."""
    (directory / "modeling_evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Words\n"
        "class EvilConfig(Config):\n    model_type = 'evil'\n"
        "class Evil(Model):\n    config_class = EvilConfig\n"
        "class EvilWords(Words):\n    pass\n"
    )
    model = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    asked = {
        "AutoModelForCausalLM": model, "AutoConfig": {"AutoConfig": "modeling_evil.EvilConfig", **model},
        "AutoTokenizer": {"AutoTokenizer": [None, "modeling_evil.EvilWords"]},
    }  # fmt: skip
    facts = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps({**facts, "auto_map": asked[key]}))


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "AutoModelForCausalLM"),
        ("config.json", "AutoConfig"),
        ("tokenizer_config.json", "AutoTokenizer"),
    ],
)
def test_code_beside_a_model_runs_only_when_asked_for(model_dir, marker, file, key, caplog):
    with_code(model_dir, marker, file, key)
    with pytest.raises(UserError, match=rf"{file} asks to run Python code .*{TRUST}") as caught:
        load_any(str(model_dir), MODEL)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    model, tokenizer, _ = load_any(str(model_dir), MODEL, trust=True)
    assert marker.exists()
    assert type(tokenizer if key == "AutoTokenizer" else model).__name__.startswith("Evil")
    caplog.clear()
    (model_dir / "modeling_evil.py").write_text("raise OSError('gone')\n")  # told of before it has run
    with pytest.raises(UserError, match="for evaluation: gone"):
        load_any(str(model_dir), MODEL, trust=True)
    assert "code of its own" in caplog.text


def test_code_of_a_base_model_never_runs_and_nobody_is_asked(model_dir, marker, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question in a job that nobody watches"))
    for file, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        with_code(model_dir, marker, file, key)
    load_model(read_base(ModelConfig(path=str(model_dir), dtype="float32")))  # a family that transformers knows
    for trust in (False, True):
        model, tokenizer, _ = load_any(str(model_dir), ModelConfig(path=str(model_dir), dtype="float32"), trust)
        assert not type(model).__name__.startswith("Evil")
        assert not type(tokenizer).__name__.startswith("Evil")
    facts = json.loads((model_dir / "config.json").read_text())
    facts |= {"model_type": "evil", "auto_map": {"AutoConfig": "modeling_evil.EvilConfig"}}
    (model_dir / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="custom code"):
        load_model(read_base(ModelConfig(path=str(model_dir), dtype="float32")))
    assert not marker.exists()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_export_of_ours_is_loaded_by_our_class_whatever_its_file_says(tmp_path, marker, family):
    config, *_ = trained(tmp_path, family, lambda spec: some_gates(spec, "per_layer"), **{"gates.shape": "per_layer"})
    directory = export.run(config)
    wanted = loaded(directory)(some_ids()).logits
    (directory / "modeling_ragged.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    for trust in (False, True):
        model, _, _ = load_any(str(directory), MODEL, trust)
        assert type(model).__module__ == "nuteprune.exporting.modeling_ragged"
        assert torch.equal(model(some_ids()).logits, wanted)
    with_code(directory, marker, "tokenizer_config.json", "AutoTokenizer")
    with pytest.raises(UserError, match=r"tokenizer_config\.json asks to run"):
        load_any(str(directory), MODEL)
    assert not marker.exists()


def test_pickled_weights_are_not_unpickled_into_code(model_dir, marker):
    class Evil:
        def __reduce__(self):
            return open, (str(marker), "w")

    (model_dir / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, model_dir / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot"):
        load_any(str(model_dir), MODEL)
    assert not marker.exists()


def test_a_task_file_runs_only_when_asked_for(tmp_path, marker):
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\ndef words(doc):\n    return 'x'\n")
    (tmp_path / "rows.jsonl").write_text('{"q": "one?", "a": 0}\n')
    file = tmp_path / "evil.yaml"
    file.write_text(
        f"task: evil\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: !function evil.words\n"
        "doc_to_choice: ['yes', 'no']\ndoc_to_target: a\n"
    )
    with pytest.raises(UserError, match=rf"task file .*is code to lm-eval.*{TRUST}"):
        load_tasks([str(file)])
    assert not marker.exists()
    assert load_tasks(["local_mc"])
    load_tasks([str(file)], trust=True)
    assert marker.exists()


def test_no_file_can_allow_code(tmp_path):
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    run.mkdir()
    for file in (run / "config.yaml", recipe):
        file.write_text("evaluate: {trust_remote_code: true}\n")
    for settings, overrides in ((run, []), (run / "config.yaml", []), (None, [f"recipe={recipe}"])):
        with pytest.raises(UserError, match=r"which no file can: give evaluate\.trust_remote_code=… when you"):
            load_config(settings, overrides)
    config = load_config(None, [TRUST])
    assert config.evaluate.trust_remote_code
    save_config(run / "config.yaml", config)
    assert not load_config(run).evaluate.trust_remote_code
    assert load_config(run, [TRUST]).evaluate.trust_remote_code


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [BOMB, "recipe: &r [*r]\n", "model: " + "[" * 100_000, "seed: 1\n" * 200_000,
     "model: !!python/object/apply:os.getcwd []", "seed: \x00", b"seed: \xff"],
    ids=["aliases", "endless", "deep", "large", "object", "control", "bytes"],
)  # fmt: skip
def test_yaml_holds_plain_values_of_a_sane_size(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"is not valid YAML|has more than") as caught:
        load_config(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.fixture
def directory(tmp_path):
    """A directory with a manifest, and a secret beside it."""
    (tmp_path / "secret").write_text("of the user")
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    write_manifest(folder)
    return folder


def test_names_in_a_manifest_stay_in_its_directory(directory):
    verify(directory)
    manifest = directory / "manifest.json"
    whole = json.loads(manifest.read_text())
    for name in ("../secret", str(directory.parent / "secret"), "sub/../../secret", "a\0b"):
        manifest.write_text(json.dumps({"files": {name: whole["files"]["a.txt"]}}))
        with pytest.raises(CheckpointError, match="names a file outside of it"):
            verify(directory)
    for broken in ("[]", '{"files": 3}', '{"files": {"a.txt": {}}}', '{"files": {"a.txt": []}}', "[" * 100_000, "\xff"):
        manifest.write_bytes(broken.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"no readable manifest\.json"):
            verify(directory)


def test_links_out_of_a_directory_are_refused(directory):
    (directory / "a.txt").unlink()
    (directory / "a.txt").symlink_to(directory.parent / "secret")
    write_manifest(directory)
    with pytest.raises(CheckpointError, match="names a file outside of it"):
        verify(directory)
    (directory / "loop").symlink_to("loop")
    (directory / "within").symlink_to("manifest.json")
    (directory / "manifest.json").write_text('{"files": {"loop": {"bytes": 1, "sha256": ""}}}')
    with pytest.raises(CheckpointError, match="is missing"):
        verify(directory)
    assert inside(directory, "within") == directory / "within"


def test_teachers_are_read_from_their_directory_only(directory):
    (directory / "teachers").mkdir()
    (directory / "teachers" / "teachers.json").write_text(
        json.dumps([{"file": "../secret", "step": 1, "sparsity": 0.1}])
    )
    with pytest.raises(CheckpointError, match="names a file outside of it"):
        load_snapshots(directory)


def test_nothing_is_written_through_a_link(directory, tmp_path):
    secret = tmp_path / "secret"
    for name in ("manifest.json", "manifest.json.tmp", "config.yaml", "config.yaml.tmp", "b.txt", "b.txt.tmp"):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(secret)
    write_atomic(directory / "b.txt", b"b")
    save_config(directory / "config.yaml", load_config(None))
    write_manifest(directory)
    (directory / "metrics.jsonl").symlink_to(secret)
    with pytest.raises(UserError, match="is a symbolic link"):
        Tracker(load_config(None, [f"run_dir={directory}", "tracking.report_to=[]"]), "prune", 1)
    assert secret.read_text() == "of the user"
    assert not (directory / "b.txt").is_symlink()


def test_weights_with_a_lying_header_are_refused(model_dir):
    weights = model_dir / "model.safetensors"
    whole = weights.read_bytes()
    header = {"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}}
    lying = json.dumps(header).encode()
    for data in (
        b"\xff" * 8 + b"{}", (1 << 60).to_bytes(8, "little"), len(lying).to_bytes(8, "little") + lying, b"", whole[:-1],
        (8).to_bytes(8, "little") + b"[" * 8,
    ):  # fmt: skip
        weights.write_bytes(data)
        with pytest.raises(UserError, match="damaged"):
            fingerprint(str(model_dir))
        with pytest.raises(UserError, match="cannot"):
            load_any(str(model_dir), MODEL)
        with pytest.raises(SafetensorError):
            load_file(weights)
    weights.write_bytes(whole)
    assert fingerprint(str(model_dir))


@pytest.mark.parametrize(
    ("name", "text"),
    [("pruned.json", "[]"), ("pruned.json", "{}"), ("pruned.json", '"x"'), ("teachers/teachers.json", '[{"step": 1}]'),
     ("teachers/teachers.json", '[{"file": "/etc/passwd", "step": 1, "sparsity": 0.1}]')],
)  # fmt: skip
def test_a_run_of_another_make_is_one_line(tmp_path, name, text):
    trained(tmp_path, "llama", lambda spec: some_gates(spec, "uniform"))
    pruned = tmp_path / "run" / "pruned"
    (pruned / name).write_text(text)
    write_manifest(pruned)
    with pytest.raises(UserError, match=r"is damaged: .") as caught:
        load_run(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_only_numbers_reach_slurm(tmp_path):
    lines = ["prune\t17", "export\t--help", "evaluate\t../../x", "prepare\t17_2", "finetune\t$(id)"]
    (tmp_path / "jobs.tsv").write_text("\n".join(lines) + "\n")
    assert jobs.submitted(tmp_path) == {"prune": "17", "prepare": "17_2"}


EVIL = "x\x1b]0;owned\x07`<script>alert(1)</script>|[y](z)\u202e\nnext"


def test_foreign_names_are_harmless_in_reports_and_cards(tmp_path):
    for text in (markdown_words(EVIL), code(EVIL), plain(EVIL)):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert plain("a\tb\nc é 漢") == "a\tb\nc é 漢"
    score = {"perplexity": 1.0, "window": 8, "blocks": 1, "tokens": 7, "delta_nll": 0.0}
    sample = {"prompt": EVIL, "continuation": EVIL, "loops": True}
    models = [
        {"name": EVIL + str(i), "path": EVIL, "parameters": 1, "perplexity": {EVIL: score}, "samples": [sample],
         "first_tokens": [EVIL], "generation": {"prompts": 1, "loops": 1.0, "distinct": 1.0}, "tasks": {
            EVIL: {"version": 1, "fewshot": 0, "examples": 1, "metrics": {EVIL: {"value": 1.0, "stderr": None}}}}}
        for i in range(3)
    ]  # fmt: skip
    facts = {
        "models": models, "ratio": {"parameters": 1.0}, "protocol": "own", "held_out": True, "same_tokens": True,
        "dtype": "float32", "task_limit": 0, "pictures": [], "environment": {"lm_eval": "0"},
    }  # fmt: skip
    for found in (page.html(facts, {}), report.table(facts)):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", found)
    assert "<script" not in page.html(facts, {})
    found = report.markdown(facts)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", found)
    for line in found.splitlines():
        outside = re.sub(r"`[^`]*`", "", line.replace("\\`", ""))
        assert line.startswith("    ") or "<" not in outside, line  # indented lines and code show HTML as it is
        assert line.startswith("    ") or "[y]" not in outside, line
    tables = [line for line in found.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in tables[:4]}) == 1
    (tmp_path / "README.md").write_text('---\nlicense: "mit\\nbase_model: evil"\n---\n')
    (tmp_path / "config.json").write_text("{}")
    assert base_licence(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert base_licence(str(tmp_path)) == {"license": "apache-2.0"}
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\nMod\xe8le")
    assert base_licence(str(tmp_path)) == {"license": "mit"}


def test_the_terminal_is_not_steered(tmp_path):
    formatter = PlainFormatter("%(message)s")
    assert formatter.format(logging.LogRecord("a", 20, "", 0, "%s", (EVIL,), None)) == plain(EVIL)
    command = [sys.executable, "-m", "nuteprune", "status", f"run_dir={tmp_path}/\x1b[31mred"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "\x1b" not in done.stdout + done.stderr
    assert "\\x1b[31mred" in done.stderr


def test_foreign_records_do_not_end_an_evaluation(tmp_path, caplog):
    for text in ("[]", "{", '{"kept": {"heads": [[1]]}, "original": {"heads": "x"}}', "[" * 100_000):
        (tmp_path / "nuteprune.json").write_text(text)
        assert pictures.kept(tmp_path / "nuteprune.json") is None
    assert caplog.text.count("is not a record of ours") == 4
    (tmp_path / "metrics.jsonl").write_text('3\n[]\n{"step": "x"}\n{}\n' + "[" * 100_000 + "\n")
    assert status.progress(tmp_path, "prune") is None
    with Tracker(load_config(None, [f"run_dir={tmp_path}", "tracking.report_to=[]"]), "prune", 1) as tracker:
        tracker.log(0, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0]


class Echo(BaseHTTPRequestHandler):
    """A hub that refuses, and quotes the request's token in its answer."""

    def do_POST(self):
        message = f"no right for {self.headers['Authorization']}"
        self.send_response(403)
        self.send_header("X-Error-Message", message)
        self.end_headers()
        self.wfile.write(json.dumps({"error": message}).encode())

    def log_message(self, *_):
        pass


def test_the_hub_token_is_in_no_message(directory, monkeypatch, caplog):
    server = HTTPServer(("127.0.0.1", 0), Echo)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_0123456789secret")
        with pytest.raises(UserError, match=r"export\.push_to_hub me/small: ") as caught:
            push(directory, ExportConfig(push_to_hub="me/small"))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert "hf_0123456789secret" not in str(caught.value) + caplog.text
    settings = yaml.safe_dump(load_config(None).__dict__.__repr__())
    assert not any(word in settings for word in ("HF_TOKEN", os.environ.get("HF_TOKEN") or "HF_TOKEN"))


def test_the_table_of_trust_names_these_tests():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8")))
    here = {name for name in globals() if name.startswith("test_")}
    assert named == here - {"test_the_table_of_trust_names_these_tests"}
