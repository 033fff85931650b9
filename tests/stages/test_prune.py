"""The prune stage on a tiny model: it reaches the target in any budget, resumes bit for bit, and fails clearly."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from transformers.utils import logging as transformers_logging

from nuteprune.arch import read_spec
from nuteprune.config import load_config
from nuteprune.errors import UserError
from nuteprune.masks import Kept
from nuteprune.planning import machine
from nuteprune.runs.checkpoint import verify, write_manifest
from nuteprune.runs.rundir import load_adapter, load_run, save_config
from nuteprune.stages import export, finetune, prune
from nuteprune.training.signals import Preempted
from nuteprune.training.teachers import TEACHERS
from nuteprune.training.trainer import TrainingFailed


def metrics(run_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


TIMED = ("prune/step_s", "prune/tokens_per_s", "prune/peak_memory_gb")
"""What no two runs share."""


def same_run(a: Path, b: Path) -> None:
    """Losses, gates, teachers and LoRA of two finished runs are bit-identical."""
    lines = [[{k: v for k, v in m.items() if k not in TIMED} for m in metrics(d)] for d in (a, b)]
    assert lines[0] == lines[1]
    files = sorted(p.relative_to(a) for p in (a / "pruned").rglob("*.safetensors"))
    assert len(files) >= 2
    for file in files:
        left, right = load_file(a / file), load_file(b / file)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left), file


@pytest.mark.parametrize(
    ("steps", "target", "shape"), [(60, 0.2, "uniform"), (60, 0.5, "per_layer_ffn"), (133, 0.35, "per_layer")]
)
def test_any_budget_holds_the_schedule_and_reaches_the_target(settings, steps, target, shape, tokenizer, tmp_path):
    wide = tmp_path / "wide"  # enough FFN units that one is less than the tolerance
    tiny_model("llama", intermediate_size=160).save_pretrained(wide)
    tokenizer.save_pretrained(wide)
    config = load_config(None, [*settings, f"train.steps={steps}", f"sparsity.target={target}", f"gates.shape={shape}",
                                "train.batch_size=2", f"model.path={wide}"])  # fmt: skip
    prune.run(config)
    run = load_run(config.run_dir)
    lines = metrics(config.run_dir)
    assert len(lines) == steps
    for m in lines:
        assert m["prune/expected_sparsity"] == pytest.approx(m["prune/target_sparsity"], abs=0.005)
    settled = [m for m in lines if m["step"] > 0.45 * steps + 1]
    assert all(abs(m["prune/expected_sparsity"] - run.sparsity) < 1e-6 for m in settled)
    record = json.loads((export.run(config) / "nuteprune.json").read_text())
    assert record["sparsity"] == pytest.approx(target, abs=0.01)
    assert record["sparsity"] == pytest.approx(run.sparsity, abs=0.001)
    teachers = [m["prune/teacher_sparsity"] for m in lines]
    # Within twenty points of the intact model no snapshot teaches better than it.
    assert (max(teachers) > 0) == (target > 0.2)
    assert teachers[-1] == 0


def test_the_structure_with_the_least_loss_is_settled_on(settings, tokenizer, tmp_path, caplog):
    deep = tmp_path / "deep"
    tiny_model("llama", intermediate_size=160, num_hidden_layers=6).save_pretrained(deep)
    tokenizer.save_pretrained(deep)
    config = load_config(None, [*settings, "gates.units=[kv_groups,ffn,layers]", "sparsity.target=0.5",
                                f"model.path={deep}", "gates.ffn_multiple=4"])  # fmt: skip
    with caplog.at_level("INFO", logger="nuteprune"):
        prune.run(config)
    measured = re.findall(r"(\d) layers of (\d) x 3 heads and (\d+) FFN units.*: cross entropy (\S+)", caplog.text)
    assert len(measured) >= 6
    assert len({layers for layers, *_ in measured}) >= 3
    layers, groups, ffn, _ = map(float, min(measured, key=lambda found: float(found[-1])))
    run = load_run(config.run_dir)
    kept = Kept.of(read_spec(tiny_config("llama", intermediate_size=160, num_hidden_layers=6)), run.gates)
    one = int(kept.layers[0])
    assert (len(kept.layers), len(kept.kv_groups[one]), len(kept.ffn[one])) == (layers, groups, ffn)
    small = json.loads((export.run(config) / "config.json").read_text())
    sizes = [small[key] for key in ("num_hidden_layers", "num_key_value_heads", "intermediate_size")]
    assert sizes == [layers, groups, ffn]
    # A rung of the run is of its kind: it has no more of a unit than lies on the way from the intact model.
    rung = export.run(load_config(config, ["export.sparsity=0.3", f"export.output={tmp_path / 'rung'}"]))
    small = json.loads((rung / "config.json").read_text())
    assert abs(small["num_hidden_layers"] - (6 + (layers - 6) * 0.6)) <= 1


def test_a_signal_while_structures_are_measured_saves_and_the_next_start_ends_bit_identical(
    settings, tmp_path, monkeypatch
):
    config = load_config(None, [*settings, "gates.units=[kv_groups,ffn,layers]", "sparsity.target=0.5"])
    whole = shutil.copytree(prune.run(config).parent, tmp_path / "whole")
    shutil.rmtree(config.run_dir)
    measure = prune.Pruning.measure

    def signalled(trainer, structures):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(trainer, structures)

    monkeypatch.setattr(prune.Pruning, "measure", signalled)
    with pytest.raises(Preempted, match="at step 27, while structures were measured: saved"):
        prune.run(config)
    monkeypatch.undo()
    prune.run(config)
    same_run(whole, Path(config.run_dir))


def test_a_snapshot_is_written_once_and_outlives_the_checkpoint_it_was_written_for(settings):
    config = load_config(None, [*settings, "sparsity.target=0.4", "teacher.lag=5", "checkpoint.every=15",
                                "checkpoint.keep=2"])  # fmt: skip
    torn = Path(config.run_dir) / "rungs"  # of a start that was killed before its first checkpoint
    torn.mkdir(parents=True)
    for step in range(60):
        for name in (f"{step:08d}", f"frozen-{step:08d}"):
            (torn / f"{name}.safetensors").write_bytes(b"torn")
    run_dir, names = prune.run(config).parent, {}
    for directory in (*sorted((run_dir / "checkpoints").iterdir()), run_dir / "pruned"):
        verify(directory)
        for file in (directory / "teachers").glob("*.safetensors"):
            names.setdefault(file.name, set()).add(file.stat().st_ino)
    assert len(names) > 10
    assert all(len(files) == 1 for files in names.values())
    shutil.rmtree(run_dir / "checkpoints")
    snapshots = load_run(run_dir).snapshots
    assert {bool(s.lora) for s in snapshots if s.teaches} == {True}
    assert {bool(s.lora) for s in snapshots if not s.teaches} == {False}


def test_adapter_opens_in_peft(finished_run, model_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = finished_run / "pruned"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), out / "adapter")
    for key, (a, b) in load_run(finished_run).lora.items():
        layer, name = key.split(".")
        block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        module = getattr(getattr(model.base_model.model.model.layers[int(layer)], block), name)
        assert torch.equal(module.lora_A["default"].weight, a)
        assert torch.equal(module.lora_B["default"].weight, b)
        assert module.scaling["default"] == 1.0
    targets = json.loads((out / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets), "the order of a set, as peft keeps them, is another in each process"


@pytest.mark.parametrize("mode", [mode for mode in TEACHERS if mode != "numerous"])
def test_other_teachers_record_only_what_they_need(settings, mode):
    config = load_config(None, [*settings, f"teacher.mode={mode}", "train.steps=30", "sparsity.target=0.4"])
    prune.run(config)
    records = TEACHERS[mode].records
    assert bool(load_run(config.run_dir).snapshots) is records
    assert records or {m["prune/teacher_sparsity"] for m in metrics(config.run_dir)} == {0.0}


def test_micro_batches_give_the_step_of_the_whole_batch(settings, tmp_path):
    losses = []
    for micro in (0, 2):
        config = load_config(None, [*settings, "train.steps=30", f"run_dir={tmp_path / str(micro)}",
                                    f"train.micro_batch={micro}"])  # fmt: skip
        prune.run(config)
        losses.append([m["prune/loss"] for m in metrics(config.run_dir)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_where_more_is_free_later_a_run_keeps_its_micro_batch(settings, tmp_path, monkeypatch):
    overrides = [*settings, "train.steps=12", "checkpoint.every=5", "train.batch_size=4", "train.micro_batch=0"]
    whole, cut = (load_config(None, [*overrides, f"run_dir={tmp_path / name}"]) for name in ("whole", "cut"))
    monkeypatch.setattr(machine, "free_memory", lambda: 0)
    prune.run(whole)
    with monkeypatch.context() as patch:
        interrupted(cut, 8, patch)
    monkeypatch.setattr(machine, "free_memory", lambda: 8 << 30)
    prune.run(cut)
    same_run(tmp_path / "whole", tmp_path / "cut")


class NoRoom(torch.autograd.Function):
    """A loss in whose backward pass the driver has no room for one of triton's kernels."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("Triton Error [CUDA]: out of memory")


def test_a_step_that_runs_out_of_memory_is_taken_in_smaller_parts(settings, tmp_path, monkeypatch, caplog):
    """As a device of which only the fourth step takes too much would say it; the losses are those of small parts.

    First torch's allocator says it in a forward pass, then the driver in a backward pass.
    """
    usual, losses, held, freed = prune.Pruning.forward, [], [], []

    def forward(trainer, ids, *rest):
        found = usual(trainer, ids, *rest)
        if not limited or trainer.step < 3 or len(ids) == 1:
            return found
        if len(ids) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        total = NoRoom.apply(found.total)
        held.append(weakref.ref(total))
        return found._replace(total=total)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append([loss() is None for loss in held]))
    monkeypatch.setattr(prune.Pruning, "forward", forward)
    for limited, micro in ((False, 4), (True, 4)):
        config = load_config(None, [*settings, f"run_dir={tmp_path / str(limited)}", f"train.micro_batch={micro}",
                                    "train.batch_size=4", "train.steps=6"])  # fmt: skip
        prune.run(config)
        losses.append([m["prune/loss"] for m in metrics(config.run_dir)])
    assert [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()] == [
        "out of memory: step 3 again, 2 sequences at a time", "out of memory: step 3 again, 1 sequences at a time"
    ]  # fmt: skip
    assert freed == [[], [True]]  # nothing holds what was too large when the cache is emptied
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][:3] == losses[1][:3]


def test_the_papers_recipe_runs_with_its_lagrangian(settings, caplog):
    config = load_config(None, [*settings, "recipe=paper", "train.steps=30", "gates.units=[heads,ffn,hidden]"])
    prune.run(config)
    assert "not the 20.00% asked for" in caplog.text  # 30 steps are too few for λ to grow
    caplog.clear()
    export.run(config)
    assert any("units change" in r.message and r.levelname == "WARNING" for r in caplog.records)
    lines = metrics(config.run_dir)
    assert lines[-1]["prune/lambda_1"] != 0
    assert all(math.isfinite(m["prune/loss"]) for m in lines)


def test_gates_are_learned_without_lora_and_fine_tuning_brings_it(settings, records):
    config = load_config(None, [*settings, "recipe=paper-masks", "train.steps=30", "gates.units=[ffn,hidden]",
                                f"finetune.data={records}", "finetune.steps=2", "finetune.seq_len=32"])  # fmt: skip
    prune.run(config)
    lora = load_adapter(finetune.run(config) / "adapter")
    assert len({key.split(".")[1] for key in lora}) == 7
    assert any(b.any() for _, b in lora.values())
    export.run(config)


def test_ten_bad_steps_end_the_run_and_name_the_last_good_checkpoint(settings, monkeypatch):
    config = load_config(None, [*settings, "checkpoint.every=5"])
    original = prune.Pruning.accumulate

    def broken(trainer, forward):
        sums = original(trainer, forward)
        return sums | {"loss": float("nan")} if trainer.step >= 7 else sums

    monkeypatch.setattr(prune.Pruning, "accumulate", broken)
    with pytest.raises(TrainingFailed, match=r"10 steps in a row .*last: step 16.*step-00000015"):
        prune.run(config)
    with pytest.raises(TrainingFailed, match=r"10 steps in a row .*last: step 16"):  # as many as without a new start
        prune.run(config)


def test_one_bad_gradient_is_skipped_counted_and_logged(settings, monkeypatch, caplog):
    config = load_config(None, settings)
    original = prune.Pruning.accumulate

    def broken(trainer, forward):
        sums = original(trainer, forward)
        if trainer.step == 4:
            next(iter(trainer.model.lora().values()))[0].grad.fill_(float("inf"))
        return sums

    monkeypatch.setattr(prune.Pruning, "accumulate", broken)
    prune.run(config)
    assert metrics(config.run_dir)[-1]["prune/skipped_steps"] == 1
    assert "step 4 skipped" in caplog.text


def test_a_signal_saves_and_the_next_start_ends_bit_identical(settings, finished_run, monkeypatch):
    cut = load_config(None, [*settings, "sparsity.target=0.4"])
    original = prune.Pruning.train_step

    def signalled(trainer):
        if trainer.step == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer)

    monkeypatch.setattr(prune.Pruning, "train_step", signalled)
    with pytest.raises(Preempted, match="at step 18 of 60"):
        prune.run(cut)
    monkeypatch.undo()
    prune.run(cut)
    same_run(finished_run, Path(cut.run_dir))


def test_tensorboard_has_the_scalars_pictures_and_texts(settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config(None, [*settings, "sparsity.constraint=lagrangian", "tracking.report_to=[tensorboard]"])
    prune.run(config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {
        "loss", "kl_loss", "label_loss", "expected_sparsity", "target_sparsity",
        "teacher_sparsity", "tokens_per_s", "peak_memory_gb",
    }  # fmt: skip
    assert {tag for tag in tags["scalars"] if tag.startswith("prune/")} == {f"prune/{name}" for name in scalars}
    details = {"lambda_1", "lambda_2", "grad_norm", "teacher_bank_mb"}
    assert {f"prune_details/{name}" for name in details} <= set(tags["scalars"])
    assert tags["images"] == ["prune/kept"]
    assert len(events.Images("prune/kept")) == 3
    assert any("config" in tag for tag in tags["tensors"])
    assert [s.step for s in events.Scalars("prune/loss")] == list(range(60))


def test_a_log_has_a_line_now_and_then_and_no_bar(settings, capsys, caplog):
    transformers_logging.disable_progress_bar()  # as a command does
    caplog.set_level("INFO", "nuteprune")
    prune.run(load_config(None, [*settings, "train.steps=4", "tracking.progress=true"]))
    told = [line for line in caplog.messages if " gone, " in line]
    assert [line.partition(",")[0] for line in told] == [
        "importance: batch 0 of 2", "importance: batch 2 of 2", "prune: step 0 of 4", "prune: step 4 of 4",
    ]  # fmt: skip
    assert "loss=" in told[-1]
    assert "\r" not in capsys.readouterr().err


def test_checkpoints_come_by_the_clock(settings, monkeypatch):
    """One is due five minutes behind the start or the last one; the clock here goes 40 s at each look."""
    clock = itertools.count(0.0, 40.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    config = load_config(None, [*settings, "train.steps=30", "checkpoint.keep=9"])
    saved = interrupted(config, 29, monkeypatch)
    steps = [int(path.name.partition("-")[2]) for path in sorted(saved.iterdir())]
    assert len(steps) >= 2
    # 19 times as long as saving took, by this clock: at most a twentieth of the time goes into it.
    assert all(later - step >= 7 for step, later in itertools.pairwise([0, *steps]))


def test_a_damaged_checkpoint_is_skipped_with_the_reason(settings, finished_run, monkeypatch, caplog):
    caplog.set_level("INFO")
    config = load_config(None, [*settings, "sparsity.target=0.4", "checkpoint.every=10", "checkpoint.keep=3"])
    saved = interrupted(config, 33, monkeypatch)
    assert sorted(p.name for p in saved.iterdir()) == ["step-00000010", "step-00000020", "step-00000030"]
    newest = saved / "step-00000030" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    flipped = saved / "step-00000020" / "gates.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(bytes(data))
    prune.run(config)
    assert "optimizer.safetensors has" in caplog.text
    assert "does not match its sha256" in caplog.text
    assert "resumed at step 10" in caplog.text
    same_run(finished_run, Path(config.run_dir))


def interrupted(config, step, monkeypatch) -> Path:
    """Run until `step` and die there; returns the checkpoints' directory."""
    original = prune.Pruning.train_step

    def dying(trainer):
        if trainer.step == step:
            raise KeyboardInterrupt
        return original(trainer)

    monkeypatch.setattr(prune.Pruning, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        prune.run(config)
    monkeypatch.undo()
    return Path(config.run_dir) / "checkpoints"


def test_damaged_checkpoints_neither_evict_new_ones_nor_lend_their_teachers(settings, finished_run, monkeypatch):
    config = load_config(None, [*settings, "sparsity.target=0.4", "checkpoint.every=10", "checkpoint.keep=2"])
    saved = interrupted(config, 35, monkeypatch)
    for path in saved.glob("step-*/teachers/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.unlink()
        path.write_bytes(bytes(data))
    interrupted(config, 15, monkeypatch)
    assert [p.name for p in saved.iterdir()] == ["step-00000010"]
    prune.run(config)
    same_run(finished_run, Path(config.run_dir))


@pytest.mark.parametrize(
    "extra",
    [
        ["recipe=paper", "train.steps=24"],
        ["gates.units=[heads,kv_groups,ffn,hidden]", "train.micro_batch=3"],
        ["model.dtype=bfloat16", "train.activation_checkpointing=true", "gates.shape=per_layer"],
    ],
    ids=["paper", "all kinds", "bf16"],
)
def test_other_settings_resume_bit_identical_too(settings, tmp_path, monkeypatch, extra):
    overrides = [*settings, "train.steps=30", *extra, "checkpoint.every=5"]
    cut = load_config(None, [*overrides, f"run_dir={tmp_path / 'cut'}"])
    interrupted(cut, 13, monkeypatch)
    prune.run(cut)
    whole = load_config(None, [*overrides, f"run_dir={tmp_path / 'whole'}"])
    prune.run(whole)
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_only_a_checkpoint_of_this_base_text_and_settings_is_gone_on_from(
    settings, model_dir, text_file, tokenizer, tmp_path, monkeypatch
):
    model, text = shutil.copytree(model_dir, tmp_path / "model"), shutil.copy(text_file, tmp_path / "text.txt")
    config = load_config(
        None, [*settings, f"model.path={model}", f"data.source={text}", "checkpoint.every=5", "train.steps=20"]
    )
    saved = interrupted(config, 12, monkeypatch)
    first, last = (saved / f"step-{step:08d}" / "teachers" for step in (5, 10))
    assert all(path.samefile(last / path.name) for path in first.glob("*.safetensors"))  # each is written once
    changes = {
        "model.path": (model / "model.safetensors", lambda: tiny_model("llama", seed=1).save_pretrained(model)),
        "config.json of model.path": (model / "config.json", lambda: _replace(model / "config.json", "1e-06", "1e-05")),
        "data.source": (Path(text), lambda: _replace(Path(text), "engineer", "conductor")),
    }
    for name, (file, change) in changes.items():
        whole = file.read_bytes()
        change()
        with pytest.raises(UserError, match=rf"^{re.escape(name)} is not what .*step-00000010 was trained on"):
            prune.run(config)
        file.write_bytes(whole)
    other = dataclasses.replace(config, run_dir=str(tmp_path / "other"), seed=1)
    foreign = interrupted(other, 12, monkeypatch) / "step-00000010"
    shutil.rmtree(saved / "step-00000010")
    shutil.copytree(foreign, saved / "step-00000010")
    with pytest.raises(UserError, match="belongs to a run with seed=1, not 0"):
        prune.run(config)
    (foreign / "state.json").write_text("{}")
    save_config(foreign / "config.yaml", config)
    write_manifest(foreign)
    shutil.rmtree(saved / "step-00000010")
    shutil.copytree(foreign, saved / "step-00000010")
    with pytest.raises(UserError, match=r"step-00000010 does not fit this run \(no 'step' in it\)"):
        prune.run(config)
    shutil.rmtree(saved / "step-00000010")
    assert prune.run(config).is_dir()


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_a_finished_run_returns_at_once(settings, run_dir):
    config = load_config(None, [*settings, "sparsity.target=0.4"])
    out = run_dir / "pruned"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert prune.run(config) == out
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    shutil.rmtree(out)
    assert prune.run(config) == out
