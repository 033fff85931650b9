"""Distillation: an exported model's own weights learn from the intact model, and what comes out is a model to serve."""

import json
import shutil
import stat
from dataclasses import replace

import gguf
import pytest
import torch
import torch.nn.functional as F
from exporting import base_model, loaded, some_gates, some_ids, trained
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nuteprune.__main__ import main
from nuteprune.arch import read_spec
from nuteprune.config import load_config
from nuteprune.data.batches import BatchStream
from nuteprune.data.prepared import TrainingText
from nuteprune.distilling import trainer
from nuteprune.distilling.trainer import load_small
from nuteprune.errors import UserError
from nuteprune.model.layers import build_view
from nuteprune.model.loading import read_base
from nuteprune.model.pairing import PairedModel
from nuteprune.model.whole import Distillation, Root
from nuteprune.runs.checkpoint import verify
from nuteprune.runs.students import open_run
from nuteprune.stages import distill, evaluate, export, finetune, prune
from nuteprune.training import blocks
from nuteprune.training.signals import Preempted

FIT = blocks.STEPS


@pytest.fixture
def config(run_dir, monkeypatch):
    """The configuration of a short distillation of a finished run's export, whose layers are fitted in a few steps."""
    monkeypatch.setattr(blocks, "STEPS", FIT // 10)
    config = load_config(run_dir, ["distill.steps=20", "tracking.progress=false", "checkpoint.every=5"])
    export.run(config)
    return config


def metrics(run_dir, key="distill/loss") -> list[float]:
    lines = (run_dir / "distill" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def test_all_weights_learn_and_the_model_loads_as_the_export_does(config, run_dir, monkeypatch):
    monkeypatch.setattr(trainer, "RELATIVE_RATE", 1.5e-2)  # forty steps of a tiny model
    for file in (*(run_dir / "export").iterdir(), run_dir / "export"):
        file.chmod(0o555)  # as in a store that is not written to
    result = distill.run(load_config(config, ["distill.steps=40"]))
    assert result == run_dir / "distill" / "model"
    before, after = (load_file(d / "model.safetensors") for d in (run_dir / "export", result))
    assert before.keys() == after.keys()
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(file.stat().st_mode & stat.S_IWUSR for file in (result, *result.iterdir()))
    entropy = metrics(run_dir, "distill/label_loss")  # a tiny teacher of random weights has only text to teach
    assert sum(entropy[-10:]) < 0.96 * sum(entropy[:10])
    assert {p.name for p in result.iterdir()} == {p.name for p in (run_dir / "export").iterdir()}
    assert (result / "config.json").read_bytes() == (run_dir / "export/config.json").read_bytes()
    assert json.loads((result / "nuteprune.json").read_text())["distilled"] == 40
    assert "| Distilled | all weights of the decoder, 40 steps, 5,120 tokens |" in (result / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(result)
    assert model.dtype == torch.float32


def test_the_loss_is_that_of_both_models_as_transformers_computes_them(config, run_dir, model_dir, monkeypatch):
    config = load_config(config, ["distill.steps=1"])
    forward, seen = distill.Distilling.forward, []

    def keep(self, ids):
        losses = forward(self, ids)
        seen.append((ids, {name: float(value.detach()) for name, value in losses.terms.items()}))
        return losses

    monkeypatch.setattr(distill.Distilling, "forward", keep)
    monkeypatch.setattr(blocks, "fit_blocks", lambda *_: None)
    distill.run(config)
    ids, terms = seen[0]
    with torch.no_grad():
        q, p = (loaded(path)(ids).logits.log_softmax(-1) for path in (run_dir / "export", model_dir))
    assert terms["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    entropy = F.cross_entropy(q[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert terms["label"] == pytest.approx(float(entropy), rel=1e-4)


@pytest.mark.parametrize(("family", "shape"), [("llama", "per_layer_ffn"), ("gemma3_text", "per_layer"),
                                               ("granite", "per_layer"), ("qwen3", "uniform"),
                                               ("gemma3_text", "uniform")])  # fmt: skip
def test_the_terms_are_those_of_the_paired_forward(family, shape, tmp_path):
    """Without the last layer in per_layer, without another one in per_layer_ffn, with all of them in uniform."""

    def gates_of(spec):
        gates = some_gates(spec, shape, hidden=40, fractional=False, empty=shape == "per_layer")
        there = torch.tensor([1.0, 0, 1, 1])
        return replace(gates, attn_sublayers=there, ffn_sublayers=there.clone()) if shape == "per_layer_ffn" else gates

    base = base_model(family, tied=family == "gemma3_text")  # as published ones are
    config, model, gates, lora = trained(tmp_path, family, gates_of, base=base, **{"gates.shape": shape})
    small = loaded(export.run(config))
    kept = json.loads((tmp_path / "run/export/nuteprune.json").read_text())["kept"]
    paired = PairedModel(model, read_spec(model.config), config.lora)
    student, teacher = (
        build_view(paired.spec, *view, paired.scaling, torch.float32) for view in ((gates, lora), (None, {}))
    )
    with torch.no_grad():
        wanted = paired(some_ids(), student, teacher, config.loss).terms
        found = Distillation(Root(small), paired, kept["layers"], kept["hidden"], config.loss)(some_ids()).terms
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(value) for name, value in wanted.items()}, rel=1e-4
    )


def test_the_layers_alone_teach_nothing(config, run_dir):
    with pytest.raises(UserError, match=r"^loss\.kl_weight is 0: distill would learn nothing of the intact model"):
        distill.run(load_config(config, ["loss.kl_weight=0", "loss.layer_weight=0.9"]))
    assert not (run_dir / "distill").exists()


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "granite", "phi3", "smollm3", "qwen3_moe"])
def test_fitted_layers_lead_the_stream_nearer_to_the_models(family, exported, monkeypatch):
    monkeypatch.setattr(blocks, "STEPS", FIT // 3)
    run, fit_blocks, distances = exported(family, 0.375 if "moe" in family else 0.4), blocks.fit_blocks, []

    def distance(distillation, whole, ids):
        """Of the last layer's output from that of the intact model's: its share of the squares."""
        own, known = outputs = [], []
        layers = whole.model.layers[-1], distillation.teacher.layers[distillation.layers[-1]]
        hooks = [
            layer.register_forward_hook(lambda _module, _inputs, out, to=to: to.append(stream_of(out)))
            for layer, to in zip(layers, outputs, strict=True)
        ]
        with torch.no_grad():
            whole.model(input_ids=ids)
            distillation.teacher.hidden(ids, distillation.view)
        for hook in hooks:
            hook.remove()
        target = distillation.kept(known[0])
        return float((own[0] - target).square().sum() / target.square().sum())

    def watched(distillation, whole, ids, *rest):
        old = {name: weight.detach().clone() for name, weight in whole.named_parameters()}
        distances.append(distance(distillation, whole, ids[:8]))
        fit_blocks(distillation, whole, ids, *rest)
        distances.append(distance(distillation, whole, ids[:8]))
        learned = [name for name, weight in whole.named_parameters() if not torch.equal(weight, old[name])]
        assert {name.split(".")[3] for name in learned} == {"self_attn", "mlp"}  # neither norms nor embeddings

    monkeypatch.setattr(blocks, "fit_blocks", watched)
    distill.run(load_config(run, ["distill.steps=1", "tracking.progress=false"]))
    assert distances[1] < 0.9 * distances[0]


def stream_of(output):
    return output[0] if isinstance(output, tuple) else output


def test_nothing_is_dropped_out_and_layers_are_recomputed(config, run_dir):
    file = run_dir / "export/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.5}))
    student = load_small(run_dir / "export", load_config(config, ["train.activation_checkpointing=true"]))
    ids, passed = torch.arange(8)[None], []
    student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passed.append(1))
    first, second = (student(ids).logits for _ in range(2))
    assert torch.equal(first, second)
    assert len(passed) == 2
    first.sum().backward()
    assert len(passed) == 3


def test_a_signal_loses_nothing_and_the_same_command_again_does_nothing(config, run_dir, leave_at):
    whole = distill.run(config)
    wanted = (whole / "model.safetensors").read_bytes()
    stamp = (whole / "manifest.json").stat().st_mtime_ns
    assert distill.run(config) == whole
    assert (whole / "manifest.json").stat().st_mtime_ns == stamp
    shutil.rmtree(whole.parent)
    leave_at(distill.Distilling, 7, distill.run, config)
    assert (distill.run(config) / "model.safetensors").read_bytes() == wanted
    assert len(metrics(run_dir)) == 20


def test_a_start_that_died_after_the_fit_is_not_fitted_again(config, run_dir, monkeypatch):
    config = load_config(config, ["distill.steps=2"])
    wanted = (distill.run(config) / "model.safetensors").read_bytes()
    shutil.rmtree(run_dir / "distill")
    with monkeypatch.context() as patch:
        patch.setattr(distill.Distilling, "train_step", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distill.run(config)
    monkeypatch.setattr(blocks, "fit_blocks", lambda *_: pytest.fail("fitted again"))
    assert (distill.run(config) / "model.safetensors").read_bytes() == wanted


def test_layers_that_were_fitted_before_a_signal_are_kept(config, run_dir, monkeypatch):
    config = load_config(config, ["distill.steps=2"])
    wanted = (distill.run(config) / "model.safetensors").read_bytes()
    shutil.rmtree(run_dir / "distill")
    fit, fitted = blocks._fit, []

    def ends_in_the_third(layer, *rest):
        if len(fitted) == 2:
            raise Preempted
        fitted.append(layer)
        fit(layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_fit", ends_in_the_third)
        with pytest.raises(Preempted):
            distill.run(config)
    names = sorted(file.name for file in (run_dir / "distill").glob("fitted-*/*"))
    assert names == ["layer-0000.safetensors", "layer-0001.safetensors"]
    again = []
    monkeypatch.setattr(blocks, "_fit", lambda layer, *rest: again.append(layer) or fit(layer, *rest))
    assert (distill.run(config) / "model.safetensors").read_bytes() == wanted
    assert len(again) == len(AutoModelForCausalLM.from_pretrained(run_dir / "export").model.layers) - 2
    assert not list((run_dir / "distill").glob("fitted-*"))


def test_a_finished_run_stays_the_same_whatever_is_said_of_distillation(run_dir):
    stamp = (run_dir / "pruned/manifest.json").stat().st_mtime_ns
    settings = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(
        settings.replace("distill:\n  steps: 0\n  deepspeed: ''\n", "")
    )  # of an earlier version
    prune.run(load_config(run_dir, ["distill.steps=7"]))
    assert (run_dir / "pruned/manifest.json").stat().st_mtime_ns == stamp


def test_evaluate_takes_the_distilled_model_too(config, run_dir, text_file):
    distill.run(config)
    settings = [f"evaluate.text=[{text_file}]", "evaluate.window=64", "evaluate.blocks=2", "evaluate.batch_sizes=[]",
                "evaluate.prompts=0"]  # fmt: skip
    assert main(["evaluate", str(run_dir), *settings]) == 0
    models = json.loads((run_dir / "evaluate/report.json").read_text())["models"]
    assert [m["path"] for m in models[1:]] == [str(run_dir / "export"), str(run_dir / "distill/model")]
    assert [m["name"] for m in models[1:]] == ["export", "distilled"]
    assert "| distilled |" in (run_dir / "evaluate/report.md").read_text()
    assert '"eval/distilled/parameters"' in (run_dir / "metrics.jsonl").read_text()


def test_a_model_distilled_from_another_export_is_told_of(config, run_dir, text_file, capsys):
    distill.run(config)
    export.run(load_config(config, ["export.sparsity=0.2"]))
    for command in (["distill", str(run_dir)], ["evaluate", str(run_dir), f"evaluate.text=[{text_file}]"]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert f"{run_dir}/distill/model was trained from another model" in told
        assert "name the models in evaluate.models, or remove" in told


@pytest.mark.parametrize("taught", [0.0, 1.0])
def test_a_distilled_model_is_fine_tuned_whole_and_written_for_llama_cpp(config, run_dir, tmp_path, leave_at, taught):
    """prune, export, distill, finetune, export to GGUF: all weights learn from answers, taught beside them or not."""
    records = tmp_path / "records.jsonl"
    rows = [{"prompt": f"The river of {n}", "completion": " is very deep in the evening."} for n in range(24)]
    records.write_text("\n".join(map(json.dumps, rows)))
    tuning = load_config(config, [f"finetune.data={records}", "finetune.seq_len=128", "finetune.batch_size=4",
                                  "finetune.steps=12", "finetune.lr=3e-3", f"finetune.distill={taught}"])  # fmt: skip
    distilled = distill.run(config)
    leave_at(trainer.Distilling, 7, finetune.run, tuning)
    result = finetune.run(tuning)
    assert result == run_dir / "instruct" / "model"
    lines = [json.loads(line) for line in (run_dir / "instruct" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    assert lines[-1]["finetune/label_loss"] < 0.8 * lines[0]["finetune/label_loss"]
    assert ("finetune/kl_loss" in lines[0]) == bool(taught)
    assert lines[0]["finetune/answer_tokens"] > 0
    before, after = (load_file(d / "model.safetensors") for d in (distilled, result))
    assert {key for key in before if torch.equal(before[key], after[key])} == {"model.embed_tokens.weight",
                                                                              "lm_head.weight"}  # fmt: skip
    assert "| Fine-tuned | all weights, 12 steps on records" in (result / "README.md").read_text()
    assert "| Distilled |" in (result / "README.md").read_text()
    export.run(load_config(config, ["export.gguf=f32"]))
    assert finetune.run(tuning) == result
    assert (result / "model.gguf").stat().st_size > 1000
    named = evaluate.run(load_config(config, ["evaluate.window=32", "evaluate.batch_sizes=[]"]))["models"]
    assert [model["name"] for model in named][1:] == ["export", "distilled", "instructed"]


def test_a_result_whose_record_is_cut_is_made_again(config, run_dir, text_file, caplog):
    whole = (distill.run(config) / "nuteprune.json").read_bytes()
    (run_dir / "distill/model/nuteprune.json").write_bytes(whole[:9])
    settings = [f"evaluate.text=[{text_file}]", "evaluate.window=64", "evaluate.batch_sizes=[]", "evaluate.prompts=0"]
    assert main(["evaluate", str(run_dir), *settings]) == 0
    assert "`nuteprune distill` makes the model again" in caplog.text
    assert (distill.run(config) / "nuteprune.json").read_bytes() == whole


def test_as_many_sequences_at_a_time_as_the_planner_finds_room_for(config, run_dir, monkeypatch, caplog):
    caplog.set_level("INFO")
    for free, wanted in ((8 << 30, 4), (0, 1)):
        shutil.rmtree(run_dir / "distill", ignore_errors=True)
        monkeypatch.setattr("nuteprune.planning.machine.free_memory", lambda free=free: free)
        distill.run(load_config(config, ["distill.steps=1"]))
        state = json.loads((run_dir / "distill" / "checkpoints" / "step-00000000" / "state.json").read_text())
        assert state["micro_batch"] == wanted
    assert "1 of 4 sequences at a time, as planned for 0.0 GB" in caplog.text


def test_what_is_said_of_training_and_loss_is_done_on_unread_text(config, run_dir, monkeypatch):
    seen = []
    forward = distill.Distilling.forward
    monkeypatch.setattr(distill.Distilling, "forward", lambda self, ids: seen.append(ids) or forward(self, ids))
    distill.run(load_config(config, ["train.batch_size=2", "distill.steps=4", "loss.label_weight=0"]))
    assert "distill/label_loss" not in json.loads((run_dir / "distill/metrics.jsonl").read_text().splitlines()[0])
    stream = BatchStream(TrainingText(str(run_dir), config.data, read_base(config.model)).blocks(), 4, config.seed)
    behind = open_run(str(run_dir), config.model).facts["steps"]
    assert torch.equal(torch.cat(seen), torch.cat([stream.batch(behind + step) for step in range(2)]))


@pytest.mark.parametrize("later", [False, True])
def test_a_gguf_of_the_export_is_made_anew(config, run_dir, later):
    with_gguf = load_config(config, ["distill.steps=1", "export.gguf=f32"])
    if later:  # the same command again, which asks for one now
        result = distill.run(load_config(config, ["distill.steps=1"]))
        trained = (result / "model.safetensors").read_bytes()
    export.run(with_gguf)
    result = distill.run(with_gguf)
    verify(result)
    assert not later or (result / "model.safetensors").read_bytes() == trained
    weights = load_file(result / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    (stored,) = (t for t in gguf.GGUFReader(result / "model.gguf").tensors if t.name == "blk.0.ffn_down.weight")
    assert torch.equal(torch.tensor(stored.data)[:, : weights.shape[1]], weights)  # padded there
    assert (result / "Modelfile").is_file()


def test_without_an_export_it_says_what_to_run(run_dir, capsys):
    assert main(["distill", str(run_dir)]) == 2
    assert f"run `nuteprune export {run_dir}` first" in capsys.readouterr().err
    assert not (run_dir / "distill").exists()


def test_another_export_is_not_taken_for_the_one_that_was_begun(config, run_dir, leave_at):
    leave_at(distill.Distilling, 0, distill.run, config)
    export.run(load_config(config, ["export.sparsity=0.2"]))
    with pytest.raises(UserError, match="the exported model is not what"):
        distill.run(config)
