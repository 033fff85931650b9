"""Every mistake of a user is one clear line on stderr, exit code 2, and nothing half-written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exporting import some_gates, trained
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from tiny import VOCAB, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from nuteprune.__main__ import main
from nuteprune.config import check_said, load_config
from nuteprune.errors import UserError
from nuteprune.runs.checkpoint import Checkpoints, atomic_directory
from nuteprune.runs.lock import alone
from nuteprune.runs.rundir import save_config
from nuteprune.stages import prune


def refused(capsys, *arguments: str) -> str:
    """The one line that the command line prints for a mistake."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("nuteprune: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gates.lrr=1", r"unknown key 'gates.lrr'; did you mean 'gates.lr'"),
        ("target=0.3", "did you mean 'sparsity.target'"),
        ("trian.steps=3", "unknown key 'trian'; did you mean 'train'"),
        ("train.steps=many", "train.steps: expected int, got 'many'"),
        ("train.steps=1.5", "train.steps: expected int, got 1.5"),
        ("tracking.progress=3", "tracking.progress: expected bool, got 3"),
        ("gates.units=[head]", "gates.units: expected .*; did you mean 'heads'"),
        ("sparsity.target=0", "sparsity.target: must be greater than 0 and less than 1, got 0"),
        ("sparsity.target=1.2", "sparsity.target: must be greater than 0 and less than 1, got 1.2"),
        ("sparsity.target=-0.1", "sparsity.target: must be greater than 0"),
        ("train=3", "'train' is a section"),
        ("seed.x=1", "'seed' is one setting, not a section"),
        ("seed=18446744073709551616", "seed: must be at least 0 and less than"),
        ("train.epochs=.inf", "train.epochs: must be .* at most 10000, got inf"),
        ("gates.lr=.inf", "gates.lr: must be a finite number, got inf"),
        ("evaluate.batch_sizes=[1,0]", "evaluate.batch_sizes: must be at least 1, got 0"),
        ("train.steps=2026-02-30", "the value is not readable as YAML"),
        ("recipe=papr", "recipe 'papr' not found: use one of .*paper"),
        ("no_equals_sign", "write it as key.sub=value"),
        ("model.path=", "model.path is empty"),
        ("run_dir=", "run_dir is empty"),
        ("model.path=/nowhere/model", "/nowhere/model: there is no such directory"),
        ("data.source=/nowhere/text.jsonl", "/nowhere/text.jsonl"),
        ("data.source=", "data.source '' does not exist"),
        ("gates.units=[kv_groups]", "at most .* of this model; add units to gates.units or lower the target"),
        ("data.seq_len=100000", "100000"),
        ("recipe=3", "recipe '3' not found"),
        ("loss.kl_weight=0", "are 0: nothing would be learned"),
    ],
)
def test_settings(settings, tmp_path, capsys, override, message):
    extra = ["sparsity.target=0.7"] if "kv_groups" in override else []
    line = refused(capsys, "prune", *settings, *extra, override)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_config_file(tmp_path, capsys):
    assert "cannot read" in refused(capsys, "prune", "--config", str(tmp_path / "none.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("train: {steps: 3\nx")
    assert "not valid YAML (line" in refused(capsys, "prune", "--config", str(bad))
    bad.write_text("- 3\n")
    assert "key: value" in refused(capsys, "prune", "--config", str(bad))
    bad.write_text("trainn: {steps: 3}\n")
    assert "bad.yaml: unknown key 'trainn'; did you mean 'train'" in refused(capsys, "prune", "--config", str(bad))
    bad.write_text("run_dir: 2026-02-30\n")
    assert "not valid YAML" in refused(capsys, "prune", "--config", str(bad))
    bad.write_text("run_dir: 2026-02-28\n")
    assert "run_dir: expected text (in quotes)" in refused(capsys, "prune", "--config", str(bad))


def test_empty_data(settings, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "holds no text" in refused(capsys, "prune", *settings, f"data.source={empty}")


@pytest.mark.parametrize("kind", ["no weights", "damaged weights", "half the weights", "no tokenizer", "big tokenizer",
                                  "unsupported", "quantized", "adapter", "no such type",
                                  "padding beyond the embedding", "no config", "no such rope", "a factor in words",
                                  "a window in words", "no such activation",
                                  "a list of tokenizer settings"])  # fmt: skip
def test_model_directory(settings, model_dir, tmp_path, capsys, kind):
    broken = tmp_path / "model"
    shutil.copytree(model_dir, broken)
    weights = broken / "model.safetensors"
    expected = {
        "no weights": "no weights", "damaged weights": "weights cannot be loaded", "half the weights": "are missing",
        "no tokenizer": "no tokenizer there", "big tokenizer": "do not belong together",
        "unsupported": "'gpt2' is not supported: use one of llama, mistral, qwen2, qwen3",
        "quantized": "its weights are quantized (fp8): prune the model that they were made from",
        "adapter": "a LoRA adapter lies there", "no config": "no readable config.json",
        "no such type": "no readable config.json there (module 'torch' has no attribute 'auto')",
        "no such rope": "config.json has rope_type 'spiral', and the transformers that is installed knows default,",
        "a factor in words": "config.json has factor 'two', where a number belongs: mend config.json",
        "a window in words": "config.json has sliding_window '16', where a number belongs: mend config.json",
        "no such activation": "config.json has hidden_act 'nope', which the transformers that is installed",
        "a list of tokenizer settings": "no usable tokenizer there ('list' object has no attribute 'get')",
        "padding beyond the embedding": "cannot be loaded (Padding_idx must be within num_embeddings)",
    }[kind]  # fmt: skip
    if kind == "no weights":
        weights.unlink()
    elif kind == "damaged weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "half the weights":
        tensors = load_file(weights)
        save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, weights, metadata={"format": "pt"})
    elif kind == "no tokenizer":
        for path in broken.glob("tokenizer*"):
            path.unlink()
    elif kind == "big tokenizer":
        tiny_model("llama", vocab_size=100).save_pretrained(broken)
    elif kind == "unsupported":
        (broken / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    elif kind in (changes := {"quantized": {"quantization_config": {"quant_method": "fp8"}},
                              "no such type": {"dtype": "auto"},
                              "no such rope": {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
                              "a factor in words": {"rope_parameters": {"rope_type": "linear", "factor": "two"}},
                              "a window in words": {"sliding_window": "16"},
                              "no such activation": {"hidden_act": "nope"},
                              "padding beyond the embedding": {"pad_token_id": VOCAB}}):  # fmt: skip
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | changes[kind]))
    elif kind == "a list of tokenizer settings":
        (broken / "tokenizer_config.json").write_text("[]")
    elif kind == "adapter":  # transformers would put it around the model's layers
        get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(broken)
    else:
        (broken / "config.json").unlink()
    assert expected in refused(capsys, "prune", *settings, f"model.path={broken}")


@pytest.mark.parametrize("deepspeed", ["", "zero3"])
def test_a_head_of_its_own_beside_tied_embeddings(settings, model_dir, tmp_path, capsys, deepspeed):
    broken = tmp_path / "model"
    shutil.copytree(model_dir, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    line = refused(capsys, "prune", *settings, f"model.path={broken}", f"deepspeed={deepspeed}")
    assert line.endswith("hold another lm_head.weight: set tie_word_embeddings to false there")


def test_activations_that_overflow_the_type(settings, model_dir, tmp_path, capsys):
    loud = tmp_path / "model"
    shutil.copytree(model_dir, loud)
    tensors = load_file(loud / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e20).mul_(1e20)  # products of two such numbers overflow
    save_file(tensors, loud / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, "prune", *settings, f"model.path={loud}")
    assert line.endswith("layer 1: what comes out of the FFN of the intact model is not finite")


def test_nothing_trains_in_float16(settings, capsys):
    line = refused(capsys, "prune", *settings, "model.dtype=float16")
    assert line.endswith("set model.dtype=bfloat16")


def test_a_shard_of_the_model_that_is_cut_or_lacks_a_weight(settings, model_dir, tmp_path, capsys):
    broken = tmp_path / "model"
    shutil.copytree(model_dir, broken, ignore=shutil.ignore_patterns("model*"))
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(broken, max_shard_size="20KB")
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    tensors, whole = load_file(shard), shard.read_bytes()
    for told, content in (("cannot be read", whole[:-100]), ("are missing", save(dict([*tensors.items()][1:])))):
        shard.write_bytes(content)
        assert told in refused(capsys, "prune", *settings, f"model.path={broken}", "deepspeed=zero3")


def test_run_directory_of_another_configuration(settings, capsys):
    assert main(["prune", *settings, "train.steps=5"]) == 0
    line = refused(capsys, "prune", *settings, "train.steps=6")
    assert "belongs to a run with train.steps=5, not 6" in line
    assert "or remove that one to start it anew" in line


def test_a_second_start_beside_the_first(settings, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    holds = (
        "import sys; from pathlib import Path; from nuteprune.runs.lock import alone\n"
        f"with alone(Path({str(run)!r}), 'prune'): print('held', flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"SLURM_JOB_ID": "17"}
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", holds], **piped) as first:
        assert first.stdout.readline() == "held\n"
        line = refused(capsys, "prune", *settings, "train.steps=2")
        assert "another `nuteprune prune` is at work there (process " + str(first.pid) in line
        assert [path.name for path in run.iterdir()] == [".prune.lock"]
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        for job in ("7", "18"):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            with pytest.raises(UserError, match="SLURM job 17"), alone(run, "prune"):
                pass
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        with alone(run, "prune"):  # requeued beside what its lost node has left
            pass
        monkeypatch.undo()
        first.kill()
    assert main(["prune", *settings, "train.steps=2"]) == 0  # a killed one is not in the way
    assert not list(run.glob(".*"))


@pytest.mark.parametrize(
    ("stage", "override", "told"),
    [
        ("export", "gates.shape=per_layer", "export reads export.shape"),
        ("export", "gates.units=[kv_groups]", "leave it out, or prune anew"),
        ("distill", "train.steps=7", "distill reads distill.steps"),
        ("distill", "data.seq_len=16", "leave it out, or prune anew"),
        ("finetune", "train.lora_lr=1e-3", "finetune reads finetune.lr"),
        ("recover", "train.steps=7", "recover reads recover.steps"),
        ("recover", "seed=3", "leave it out, or prune anew"),
        ("evaluate", "sparsity.target=0.9", "leave it out, or prune anew"),
    ],
)
def test_a_setting_of_pruning_that_a_later_stage_would_ignore(settings, tmp_path, capsys, stage, override, told):
    pruned = tmp_path / "run" / "pruned" / "config.yaml"
    pruned.parent.mkdir(parents=True)
    save_config(pruned, load_config(None, settings))
    line = refused(capsys, stage, *settings, override)
    assert line.startswith(f"nuteprune: {override.partition('=')[0]}=")
    assert f"{stage} takes this from the run" in line
    assert told in line
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [pruned]


@pytest.mark.parametrize(
    ("stage", "override"),
    [("finetune", "loss.layer_weight=3.0"), ("distill", "train.lora_lr=0.5"), ("distill", "loss.layer_weight=1.0")],
)
def test_a_setting_that_a_later_stage_does_not_read_at_all(settings, tmp_path, stage, override):
    (tmp_path / "run" / "pruned").mkdir(parents=True)
    save_config(tmp_path / "run" / "pruned" / "config.yaml", load_config(None, settings))
    with pytest.raises(UserError, match=f"^{override}: {stage} does not read this; leave it out$"):
        check_said(stage, load_config(None, [*settings, override]), [override])


def test_a_refused_fine_tuning_leaves_no_directory(run_dir, records, tmp_path, monkeypatch, capsys):
    """`status` would call it incomplete, and `recover` would take a rung for fine-tuned."""
    monkeypatch.chdir(tmp_path)
    before = sorted(run_dir.rglob("*"))
    for words, told in (
        ([], "finetune.data '': give an existing file of records (.json"),
        (["--data", "none.json", "--sparsity", "0.1"], "finetune.data 'none.json': give an existing file of records"),
        (["--data", str(records), "--sparsity", "0.9"], "the run never got there"),
        (["--data", str(records), "deepspeed=none"], "deepspeed 'none': no such file"),
    ):
        assert told in refused(capsys, "finetune", str(run_dir), *words)
        assert sorted(run_dir.rglob("*")) == before


def test_what_a_later_stage_reads_or_the_run_has_already_is_no_mistake(settings, tmp_path):
    own = load_config(None, settings)
    (tmp_path / "run" / "pruned").mkdir(parents=True)
    save_config(tmp_path / "run" / "pruned" / "config.yaml", own)
    for stage, override in (
        ("export", f"sparsity.target={own.sparsity.target}"), ("export", "evaluate.window=64"),
        ("distill", "train.batch_size=2"), ("distill", "loss.kl_weight=3"), ("evaluate", "data.text_field=words"),
        ("prune", "train.steps=7"),
    ):  # fmt: skip
        check_said(stage, load_config(None, [*settings, override]), [override])


def test_unwritable_output(settings, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        told = refused(capsys, "prune", *settings, f"run_dir={run_dir}")
        assert told == f"nuteprune: run_dir {run_dir} is a file, or below one: choose another directory"


def test_export_of_a_missing_or_damaged_run(settings, tmp_path, capsys):
    assert "run_dir is empty" in refused(capsys, "export")
    assert "run `nuteprune prune` first" in refused(capsys, "export", f"run_dir={tmp_path / 'nothing'}")
    config = load_config(None, [*settings, "train.steps=5"])
    gates = prune.run(config) / "gates.safetensors"
    gates.write_bytes(gates.read_bytes()[:-3])
    assert "is damaged" in refused(capsys, "export", f"run_dir={config.run_dir}")
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize(
    ("family", "shape", "asked", "message"),
    [
        ("qwen3", "per_layer", "export.gguf=f16", "only where all layers are alike: use export.shape=uniform"),
        ("qwen3", "uniform", "export.gguf=f16", "has no bias on o_proj, as this model has: export without export.gguf"),
        ("olmo2", "uniform", "export.gguf=f16", ": export without export.gguf"),
        ("llama", "uniform", "export.gguf=q4_0", "q4_k_m | q3_k_m, got 'q4_0'"),
        ("llama", "per_layer", "export.shape=uniform", "which no stock model lacks: use export.shape=per_layer_ffn"),
        ("llama", "per_layer", "export.shape=per_layer_fnn", "did you mean 'per_layer_ffn'"),
    ],
)
def test_exports_that_an_engine_or_a_shape_cannot_hold(tmp_path, capsys, family, shape, asked, message):
    trained(tmp_path, family, lambda spec: some_gates(spec, shape), **{"gates.shape": shape})
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(capsys, "export", f"run_dir={tmp_path / 'run'}", asked)
    assert sorted(tmp_path.rglob("*")) == before


def test_absent_sublayers_in_the_uniform_shape(settings, tmp_path, capsys):
    asked = ("gates.shape=uniform", "gates.units=[ffn,attn_sublayers]")
    line = refused(capsys, "prune", *settings, *asked)
    assert "whole sublayers need gates.shape=per_layer_ffn or per_layer" in line
    assert not (tmp_path / "run" / "pruned").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk is made with a small tmpfs, which only root may mount")
def test_full_disk_while_saving_leaves_the_old_checkpoint(settings, tmp_path, capsys, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
    try:
        arguments = [*settings, f"run_dir={disk}", "checkpoint.every=2", "tracking.report_to=[]", "lora.rank=48",
                     "sparsity.warmup=0.9"]  # fmt: skip
        line = refused(capsys, "prune", *arguments)
        assert "a fault of this machine, not of the settings: cannot write" in line
        assert "No space left on device" in line
        assert "what was saved before is intact" in line
        newest, skipped = Checkpoints(disk / "checkpoints", keep=2).newest_valid()
        assert newest is not None
        assert not skipped
        assert not list((disk / "checkpoints").glob(".step-*"))
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        caplog.set_level("INFO")
        assert main(["prune", *arguments]) == 0
        assert f"resumed at step {int(newest.name.removeprefix('step-'))} " in caplog.text
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk is made with a small tmpfs, which only root may mount")
def test_full_disk_while_a_tokenizer_is_saved_is_one_line(tmp_path):
    """Tokenizers, written in Rust, raises a bare `Exception` then."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], check=True)
    try:
        with (
            pytest.raises(UserError, match=r"No space left on device.*what was saved before is intact"),
            atomic_directory(disk / "export") as directory,
        ):
            tiny_tokenizer().save_pretrained(directory)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("name", ["export", "export[1]"])
def test_what_a_killed_process_left_goes_and_another_outputs_directory_stays(name, tmp_path):
    left, other = tmp_path / f".{name}.tmp-1", tmp_path / f".{name}.v2.tmp-1"
    left.mkdir()
    other.mkdir()
    with atomic_directory(tmp_path / name):
        assert not left.exists()
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / name]


def test_of_two_at_once_into_one_place_both_end(tmp_path):
    """The second took what the first was writing for left by a killed process, and the first told of a full disk."""
    writes = (
        "import sys; from pathlib import Path; from nuteprune.runs.checkpoint import atomic_directory\n"
        f"with atomic_directory(Path({str(tmp_path / 'export')!r})) as directory:\n"
        "    print('there', flush=True); sys.stdin.read(); (directory / 'file').write_text('first')"
    )
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", writes], **piped) as first:
        assert first.stdout.readline() == "there\n"
        with atomic_directory(tmp_path / "export") as directory:
            (directory / "file").write_text("second")
        first.stdin.close()
        assert first.wait() == 0
    assert (tmp_path / "export" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_result_that_a_killed_process_moved_aside_is_put_back(tmp_path):
    target, old = tmp_path / "export", tmp_path / ".export.old-1"
    old.mkdir()
    (old / "file").write_text("earlier")
    with pytest.raises(ZeroDivisionError), atomic_directory(target):
        raise ZeroDivisionError
    assert [path.read_text() for path in tmp_path.rglob("file")] == ["earlier"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.geteuid() != 0, reason="a read-only directory is made with a tmpfs, which only root may mount")
def test_a_directory_that_turns_read_only_under_evaluate_is_one_line(model_dir, text_file, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], check=True)
    try:
        for name in ("manifest.json", "report.json"):  # of an earlier report, whose first the first new result unlinks
            (disk / name).write_text("{}")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        told = refused(capsys, "evaluate", f"evaluate.models=[{model_dir}]", f"evaluate.text={text_file}",
                       "evaluate.window=32", "evaluate.batch_sizes=[]", f"evaluate.output={disk}")  # fmt: skip
        assert f"{disk}/manifest.json: Read-only file system" in told
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_report_takes_no_place_of_a_model_or_a_run(model_dir, tmp_path, capsys):
    """Its manifest would stand for that directory's, and a push to the hub would leave out the weights."""
    (tmp_path / "manifest.json").write_text("{}")
    told = refused(capsys, "evaluate", f"evaluate.models=[{model_dir}]", f"evaluate.output={tmp_path}")
    assert f"evaluate.output: {tmp_path} holds something else of ours" in told
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_evaluate_of_a_missing_model(tmp_path, capsys):
    assert "nowhere" in refused(capsys, "evaluate", f"run_dir={tmp_path}", "evaluate.models=[/nowhere]")
    assert not list(Path(tmp_path).glob("evaluate*"))


@pytest.mark.parametrize("where", ["card", "host"])
def test_out_of_memory_is_one_line_with_what_to_lower(settings, capsys, monkeypatch, where):
    def too_much(config):
        if where == "card":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total …")
        torch.empty(1 << 50)

    monkeypatch.setattr(prune, "run", too_much)
    assert main(["prune", *settings]) == 1
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    assert "out of memory" in told
    assert "set model.dtype=bfloat16, lower data.seq_len" in told
