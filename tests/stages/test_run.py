"""`nuteprune run`: all stages in one command, settings for the machine, held-out text, and going on."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import yaml
from tiny import SENTENCES, tiny_config

from nuteprune.__main__ import main
from nuteprune.chain import hold_out, settle, with_choices
from nuteprune.config import given_keys, load_config
from nuteprune.data.text import text_tokens
from nuteprune.model.loading import read_base
from nuteprune.planning.cards import CARDS, UNNAMED
from nuteprune.planning.machine import Choice, Machine, card_of, choose, pruning_steps
from nuteprune.runs.rundir import save_config


def test_one_command_from_a_model_to_its_report(model_dir, tmp_path, capsys, caplog, monkeypatch):
    caplog.set_level("INFO", "nuteprune")
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    documents = [f"{SENTENCES[n]} {SENTENCES[-n]}" for n in range(120)]
    text.write_text("".join(json.dumps({"content": document}) + "\n" for document in documents))
    command = ["run", str(model_dir), "--data", str(text), "--out", str(out), "--sparsity", "0.3", "data.seq_len=32",
               "gates.importance_tokens=64", "gates.ffn_multiple=1", "tracking.progress=false",
               "evaluate.window=32", "evaluate.batch_sizes=[]", "evaluate.trust_remote_code=true",
               "model.dtype=float32", "data.text_field=content"]  # fmt: skip
    monkeypatch.setattr("nuteprune.planning.machine.CPU_STEPS", 8)
    monkeypatch.setattr("nuteprune.training.blocks.STEPS", 30)

    def told_to_leave(*_args):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("nuteprune.stages.export.run", told_to_leave)
        assert main(command) == 75
    assert "SIGTERM outside of training: what was finished is kept" in capsys.readouterr().err
    pruned = (out / "pruned" / "manifest.json").stat().st_mtime_ns
    # It goes on, with the steps that were chosen when there was memory for them.
    monkeypatch.setattr("nuteprune.planning.machine.free_memory", lambda: 0)
    assert main(command) == 0
    assert (out / "pruned" / "manifest.json").stat().st_mtime_ns == pruned
    told = capsys.readouterr().out
    assert "heldout.jsonl" in told
    assert "% of the parameters are the vocabulary's" in caplog.text
    report = json.loads((out / "evaluate" / "report.json").read_text())
    assert report["held_out"]
    assert [Path(m["path"]) for m in report["models"]] == [model_dir, out / "export", out / "distill" / "model"]
    held_out = [json.loads(line)["content"] for line in (out / "heldout.jsonl").read_text().splitlines()]
    assert held_out == documents[-6:]
    # The file says all that is not a default, or was said; the trained run had the same.
    settings = yaml.safe_load((out / "run.yaml").read_text())
    assert settings["data"]["documents"] == 114
    assert settings["model"]["dtype"] == "float32"
    assert (settings["train"]["steps"], settings["distill"]["steps"]) == (4, 4)
    assert load_config(out / "run.yaml") == load_config(out / "config.yaml", [f"run_dir={out}"])
    # The file is the same run.
    assert main(["run", "--config", str(out / "run.yaml")]) == 0
    assert (out / "pruned" / "manifest.json").stat().st_mtime_ns == pruned
    # It is evaluated on another text where that is said.
    other = tmp_path / "other.txt"
    other.write_text(" ".join(SENTENCES[:40]))
    assert main([*command, f"evaluate.text=[{other}]"]) == 0
    assert list(json.loads((out / "evaluate" / "report.json").read_text())["models"][0]["perplexity"]) == ["other.txt"]
    # Another run is refused before its settings are written.
    before = (out / "run.yaml").read_bytes()
    assert main([*command, "train.steps=5"]) == 2
    assert "belongs to a run with train.steps=4, not 5" in capsys.readouterr().err
    assert (out / "run.yaml").read_bytes() == before


def test_what_is_held_out_fills_a_window_or_the_window_gives_way(model_dir, tmp_path, caplog):
    text, words = tmp_path / "text.jsonl", [f"model.path={model_dir}", f"run_dir={tmp_path}"]

    def held_out(count, *settings):
        text.write_text("".join(json.dumps({"text": SENTENCES[n % 100]}) + "\n" for n in range(count)))
        settings = [*words, f"data.source={text}", *settings]
        choices, lines = hold_out(load_config(None, settings), given_keys(None, settings))
        return lines.count("\n"), {choice.key: choice.value for choice in choices}

    fifty, _ = held_out(2000, "evaluate.window=256")
    assert fifty == 50
    more, chosen = held_out(4000, "evaluate.window=2048")
    assert 50 < more < 200
    assert chosen == {"data.documents": 4000 - more, "evaluate.text": [str(tmp_path / "heldout.jsonl")]}
    all_of_them, chosen = held_out(200)
    assert all_of_them == 10
    assert 64 <= chosen["evaluate.window"] < 2048
    nothing = (0, {})
    assert "too few can be held out" not in caplog.text
    assert held_out(200, "evaluate.window=2048") == held_out(40) == held_out(19) == nothing
    assert "of 19 documents (a .txt file is one) too few can be held out" in caplog.text
    assert held_out(200, "evaluate.protocol=published") == held_out(200, "evaluate.text=[a.txt]") == nothing


def test_the_window_counts_the_text_as_it_is_scored(model_dir, tokenizer, tmp_path):
    """Its documents are joined by line ends, which may merge with theirs."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"\n{SENTENCES[n % 100]}\n"}) + "\n" for n in range(200)))
    words = [f"model.path={model_dir}", f"run_dir={tmp_path}", f"data.source={text}"]
    choices, lines = hold_out(load_config(None, words), given_keys(None, words))
    alone = sum(len(tokenizer(json.loads(line)["text"])["input_ids"]) for line in lines.splitlines())
    (tmp_path / "heldout.jsonl").write_text(lines)
    scored = len(text_tokens(tmp_path / "heldout.jsonl", "text", tokenizer))
    assert scored != alone
    assert {choice.key: choice.value for choice in choices}["evaluate.window"] == scored


def test_what_was_held_out_stays_so_whatever_becomes_of_the_text(model_dir, tmp_path):
    run_dir, text = tmp_path / "run", tmp_path / "text.jsonl"
    written = [json.dumps({"text": s}) + "\n" for s in SENTENCES * 5]
    text.write_text("".join(written))
    words = [f"model.path={model_dir}", f"run_dir={run_dir}", f"data.source={text}", "evaluate.window=64"]
    config, machine = load_config(None, words), Machine("a processor")
    spec = read_base(config.model).spec
    first, _, held_out = settle(config, given_keys(None, words), machine, spec)
    run_dir.mkdir()
    (run_dir / "heldout.jsonl").write_text(held_out)
    save_config(run_dir / "config.yaml", first)
    published = [*words, "evaluate.protocol=published"]
    now = settle(load_config(None, published), given_keys(None, published), machine, spec)
    assert (now[0].data.documents, now[0].evaluate.text, now[2]) == (first.data.documents, [], "")
    text.write_text("".join(reversed(written)))
    assert settle(config, given_keys(None, words), machine, spec)[::2] == (first, held_out)
    text.unlink()
    assert settle(config, given_keys(None, words), machine, spec)[::2] == (first, held_out)


def test_a_directory_of_any_name_is_handed_on_as_it_is():
    path = "/runs/ü 漢 😀/heldout.jsonl"
    assert with_choices(load_config(None), [Choice("evaluate.text", [path], "")]).evaluate.text == [path]


def test_a_mistake_is_one_line_and_leaves_nothing(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync._cffi_bindings", None)
    bare, file = tmp_path / "bare", tmp_path / "file"
    shutil.copytree(model_dir, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    file.touch()
    (texts := tmp_path / "texts").mkdir()
    text = texts / "text.jsonl"
    text.write_text((json.dumps({"text": SENTENCES[0]}) + "\n") * 200)
    for words, told in (
        ([], "name a model"), ([str(tmp_path / "none")], "none"),
        ([str(model_dir), "--data", str(tmp_path / "no.jsonl")], "no.jsonl' does not exist"),
        ([str(bare), "--data", str(text)], "tokenizer"),
        ([str(model_dir), "--data", str(text), "export.ladder=[0.1]"], "run exports one model"),
        ([str(model_dir), "--data", str(text), "recover.ladder=[0.1]"], "give recover.ladder to `nuteprune recover`"),
        ([str(model_dir), "--data", str(text), "finetune.data=a.json", "finetune.sparsity=0.2"],
         "fine-tune the student at 0.2 and export that at 0.3"),
        ([str(model_dir), "--data", str(text), f"export.output={texts}"], "not an earlier export"),
        ([str(model_dir), "--data", str(text), "--gguf", "q4_k_m"], "llama.cpp makes K-quants, and is not there"),
        ([str(model_dir), "--data", str(text), "evaluate.text=none.txt"], "'none.txt' does not exist"),
        ([str(model_dir), "--data", str(text), "--sparsity", "0.99", "gates.units=[ffn]"], "0.99 is out of reach"),
        ([str(model_dir), "--data", str(texts), "--out", str(texts / "runs" / "a")], "all of which is read as text"),
        ([str(model_dir), "--data", str(text), "--out", str(file / "x")], "is a file, or below one: choose"),
    ):  # fmt: skip
        assert main(["run", "--sparsity", "0.3", "--out", str(tmp_path / "out"), *words]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("nuteprune: ")
        assert told in line
        assert not (tmp_path / "out").exists()
        assert list(texts.iterdir()) == [text]


def test_a_run_that_began_with_another_text_for_the_report_goes_on_without_it(model_dir, tmp_path):
    """As where that text could not be read."""
    (text := tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in SENTENCES * 5))
    words = [f"model.path={model_dir}", f"run_dir={tmp_path / 'run'}", f"data.source={text}", "evaluate.window=64"]
    config, machine = load_config(None, words), Machine("a processor")
    spec = read_base(config.model).spec
    assert settle(config, given_keys(None, words), machine, spec)[0].data.documents == 1230
    (tmp_path / "run").mkdir()
    save_config(tmp_path / "run" / "config.yaml", load_config(None, [*words, "evaluate.text=none.txt"]))
    found, _, held_out = settle(config, given_keys(None, words), machine, spec)
    assert (found.data.documents, found.evaluate.text, held_out) == (config.data.documents, [], "")


def test_settings_follow_the_machine_and_give_way_to_the_users(tmp_path):
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
             "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
    for layers, directory in ((32, tmp_path), (80, tmp_path / "deep")):
        tiny_config("llama", **sizes, num_hidden_layers=layers).save_pretrained(directory)
    config = load_config(None, [f"model.path={tmp_path}", "sparsity.target=0.3"])

    def chosen(machine, *settings):
        asked, given = load_config(config, settings), given_keys(None, settings)
        return {choice.key: choice.value for choice in choose(asked, given, machine, read_base(asked.model).spec)[0]}

    one = chosen(Machine("H100", 1, CARDS["h100"], bf16=True))
    assert one["model.dtype"] == "bfloat16"
    assert "deepspeed" not in one
    assert chosen(Machine("4 x RTX 4090", 4, CARDS["4090"], bf16=True))["deepspeed"] == "zero2"
    deep = chosen(Machine("4 x RTX 4090", 4, CARDS["4090"], bf16=True), f"model.path={tmp_path / 'deep'}")
    assert deep["deepspeed"] == "zero3"
    three = chosen(Machine("3 x H100", 3, CARDS["h100"], bf16=True))
    assert three["train.batch_size"] == 18
    cpu = chosen(Machine("a processor"), "train.batch_size=2", "train.steps=7")
    assert cpu == {"data.seq_len": 256}
    # What is said stays as it is, if it is the default too.
    assert not chosen(Machine("a processor", bf16=True), "model.dtype=float32", "data.seq_len=512",
                      "train.batch_size=16", "train.steps=2000")  # fmt: skip


def test_a_run_learns_what_to_remove_and_distils_in_the_rest_of_its_steps(tmp_path, monkeypatch):
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
             "head_dim": 128, "vocab_size": 32000}  # fmt: skip
    tiny_config("llama", **sizes, num_hidden_layers=32).save_pretrained(tmp_path)
    config = load_config(None, [f"model.path={tmp_path}", "sparsity.target=0.5"])
    spec = read_base(config.model).spec

    def steps(machine, *settings):
        asked, given = load_config(config, settings), given_keys(None, settings)
        found = {choice.key: choice.value for choice in choose(asked, given, machine, spec)[0]}
        return found.get("train.steps"), found.get("distill.steps")

    eight, one = (Machine("H100", count, CARDS["h100"], bf16=True) for count in (8, 1))
    monkeypatch.setattr("nuteprune.planning.machine.free_memory", lambda: 9e10)
    assert steps(eight) == steps(eight, "sparsity.constraint=projection") == (200, 1800)
    plan = choose(config, set(), eight, spec)[1]
    assert plan.job.config.distill.steps == 1800
    assert plan.distilling.peak < 0.9 * 80e9
    assert steps(one) == (200, 1800)  # 14 bytes of each of 3.5B parameters, beside the intact model
    small = Machine("A100", 1, CARDS["a100-40"], bf16=True)
    left_out = [choice.why for choice in choose(config, set(), small, spec)[0] if choice.key == "distill.steps"]
    assert left_out == ["left out: needs 60 GB a card, 36 may be taken"]
    monkeypatch.setattr("nuteprune.planning.machine.free_memory", lambda: 7e10)
    assert steps(eight) == (2000, 0)  # a checkpoint's 16 bytes of each, and eight processes
    monkeypatch.setattr("nuteprune.planning.machine.free_memory", lambda: 9e10)
    for given in (
        "distill.steps=5",
        "distill.steps=0",
        "sparsity.constraint=lagrangian",
        "loss.kl_weight=0 loss.layer_weight=0.9",
    ):
        assert steps(eight, *given.split()) == (2000, None)
    assert steps(eight, "train.steps=50") == steps(eight, "train.epochs=2") == (None, None)
    for free, wanted in ((1 << 37, (60, 60)), (1 << 35, (120, 0))):
        monkeypatch.setattr("nuteprune.planning.machine.free_memory", lambda free=free: free)
        assert steps(Machine("a processor")) == wanted
    assert [pruning_steps(count) for count in (40, 600, 1200, 3000)] == [20, 120, 120, 300]


def test_cards_are_known_by_their_drivers_names():
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA GeForce RTX 4090": "4090",
             "AMD Instinct MI300X": "mi300x"}  # fmt: skip
    assert {name: card_of(name).name for name in names} == names
    assert card_of("Matrox Millennium") == UNNAMED
