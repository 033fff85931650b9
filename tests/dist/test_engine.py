"""Several ranks against one process: the same curve, teachers and units, however partitioned and wherever resumed."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import QUIET

from nuteprune.config import load_config
from nuteprune.data.prepared import TrainingText
from nuteprune.parallel.distributed import RankLost
from nuteprune.stages import prune

pytestmark = pytest.mark.xdist_group("ranks")

STEPS = 50


def metrics(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def dump_ranks(rank: int) -> None:
    """Let each rank write its whole state after the last step."""
    original = prune.Pruning.train_step

    def dumping(trainer):
        scalars = original(trainer)
        if trainer.step == trainer.total - 1:
            directory = Path(trainer.config.run_dir) / f"rank-{rank}"
            directory.mkdir()
            trainer.engine.optimizers = {}  # the one part that is not alike: each rank holds a share
            trainer.save(directory, {})
        return scalars

    prune.Pruning.train_step = dumping


@pytest.fixture(scope="module")
def overrides(model_dir, text_file):
    """A run whose micro-batches are those of four ranks.

    At half the default's rate and rank of LoRA and a quarter of the gates' rate: what rounding differs in over 50 steps
    grows with each. At the default's rate of gates it reaches 1e-4 while they settle, on a CPU with AVX-512.
    """
    return [
        f"model.path={model_dir}", f"data.source={text_file}", "data.seq_len=32", f"train.steps={STEPS}",
        "train.batch_size=4", "train.micro_batch=1", "gates.importance_tokens=256", *QUIET,
        "gates.ffn_multiple=1", "gates.hidden_multiple=1", "checkpoint.every=20", "checkpoint.keep=9",
        "gates.shape=uniform", "gates.units=[kv_groups,ffn,layers]", "train.lora_lr=1e-3", "gates.lr=0.6",
        "lora.rank=8", "lora.alpha=8", "teacher.lag=5", "teacher.share=1", "loss.layer_weight=0.1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one(overrides, tmp_path_factory):
    """Run directory of one process."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    prune.run(load_config(None, [*overrides, f"run_dir={run_dir}"]))
    return run_dir


@pytest.fixture(scope="module")
def two(overrides, tmp_path_factory):
    """Run directory of two ranks under ZeRO-3."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    arguments = ["prune", *overrides, f"run_dir={run_dir}", "deepspeed=zero3"]
    ended = ranks.run(arguments, 2, run_dir.parent / "logs", dump_ranks)
    assert "Warning" not in ended[0].text + ended[1].text
    assert "WARNING" not in ended[0].text + ended[1].text
    assert ended[1].text == ""
    return run_dir


def same_curve(run_dir: Path, reference: Path) -> None:
    """Losses to 1e-4, teachers recorded at the same steps, the same units kept."""
    lines, expected = metrics(run_dir), metrics(reference)
    assert [m["step"] for m in lines] == [m["step"] for m in expected]
    terms = [key for key in expected[0] if key.endswith("_loss")]
    for key in ("prune/loss", *terms, "prune/teacher_sparsity", "prune/expected_sparsity"):
        assert [m[key] for m in lines] == pytest.approx([m[key] for m in expected], rel=1e-4)
    assert [m["prune/teachers"] for m in lines] == [m["prune/teachers"] for m in expected]
    mine, theirs = (load_file(d / "pruned/gates.safetensors") for d in (run_dir, reference))
    kinds = [key for key in theirs if key.startswith("gates.")]
    assert kinds
    assert all(torch.equal(mine[k], theirs[k]) for k in kinds)


def from_checkpoint(source: Path, target: Path, step: int) -> None:
    """A run directory as a run leaves it that died right after writing the checkpoint of `step`."""
    name = f"step-{step:08d}"
    shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)
    shutil.copy(source / "config.yaml", target)
    shutil.copy(source / "metrics.jsonl", target)


def test_two_ranks_under_zero3_follow_one_process(one, two):
    same_curve(two, one)


def test_gates_lora_and_teachers_have_the_same_bits_on_all_ranks(two):
    first, second = two / "rank-0", two / "rank-1"
    files = sorted(p.relative_to(first) for p in first.rglob("*.safetensors"))
    assert {"gates.safetensors", "adapter/adapter_model.safetensors", "frozen.safetensors"} <= set(map(str, files))
    known = json.loads((second / "teachers/teachers.json").read_text())
    assert sum(entry["teaches"] for entry in known) >= 5
    alone = {entry["file"] for entry in known if not entry["teaches"]}
    assert alone  # rungs, and the frozen ranks that no teacher has
    alone |= {e["frozen"] for e in known} - {e["frozen"] for e in known if e["teaches"]}
    files = [file for file in files if file.name not in alone]
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_saved_on_two_resumed_on_one(one, two, overrides, tmp_path):
    from_checkpoint(two, tmp_path, 20)
    prune.run(load_config(None, [*overrides, f"run_dir={tmp_path}"]))
    same_curve(tmp_path, one)


HPZ = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}


def test_saved_on_two_resumed_on_four_with_hpz_and_checkpointing(one, two, overrides, tmp_path):
    (tmp_path / "hpz.json").write_text(json.dumps(HPZ))
    run_dir = tmp_path / "run"
    from_checkpoint(two, run_dir, 20)
    ranks.run(["prune", *overrides, f"run_dir={run_dir}", f"deepspeed={tmp_path / 'hpz.json'}",
               "train.activation_checkpointing=true"], 4, tmp_path / "logs")  # fmt: skip
    same_curve(run_dir, one)


@pytest.mark.parametrize("settings", ["zero2", "zero3_offload"])
def test_saved_on_one_resumed_on_two(one, overrides, tmp_path, settings):
    run_dir = tmp_path / "run"
    from_checkpoint(one, run_dir, 20)
    ranks.run(["prune", *overrides, f"run_dir={run_dir}", f"deepspeed={settings}"], 2, tmp_path / "logs")
    same_curve(run_dir, one)


def until_step(run_dir: Path, step: int, group: ranks.Group) -> None:
    """Wait until a run has logged a step."""
    limit = time.monotonic() + ranks.HANG
    while len(metrics(run_dir)) <= step:
        assert time.monotonic() < limit
        assert all(p.is_alive() for p in group.processes), group.wait()
        time.sleep(0.01)


def slow_steps(rank: int) -> None:
    """Stretch each step, so that a signal can be aimed."""
    original = prune.Pruning.train_step
    prune.Pruning.train_step = lambda trainer: (time.sleep(0.05), original(trainer))[1]


def test_a_signal_to_one_rank_saves_and_ends_all_and_the_next_start_has_the_same_bits(two, overrides, tmp_path):
    """Before the gates settle: what was measured before the first step is not measured again."""
    run_dir = tmp_path / "run"
    arguments = ["prune", *overrides, f"run_dir={run_dir}", "deepspeed=zero3"]
    group = ranks.Group(arguments, 2, tmp_path / "logs", slow_steps)
    until_step(run_dir, 5, group)
    group.signal(1, signal.SIGTERM)
    first, second = group.wait()
    assert (first.code, second.code) == (75, 75), first.text + second.text
    step = int(re.search(r"a signal to another rank at step (\d+) of 50: saved", first.text)[1])
    assert second.text == ""
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    again = ranks.run(arguments, 2, tmp_path / "again")[0].text
    measured = ("measuring the importance", "measuring the FFN units", "gates settled")
    assert [[words in text for words in measured] for text in (first.text, again)] == [[1, 1, 0], [0, 0, 1]]
    losses = [[line["prune/loss"] for line in metrics(directory)] for directory in (run_dir, two)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("victim", [0, 2])
def test_kill_9_of_a_rank_ends_the_others_with_a_line_and_the_next_start_goes_on(one, overrides, tmp_path, victim):
    run_dir = tmp_path / "run"
    arguments = ["prune", *overrides, f"run_dir={run_dir}", "deepspeed=zero3"]
    group = ranks.Group(arguments, 4, tmp_path / "logs", slow_steps)
    until_step(run_dir, 22, group)
    began = time.monotonic()
    group.signal(victim, signal.SIGKILL)
    ended = group.wait()
    assert time.monotonic() - began < 60
    for rank, end in enumerate(ended):
        assert end.code == (-signal.SIGKILL if rank == victim else RankLost.exit_code), end.text
        if rank != victim:
            lines = [line for line in end.text.splitlines() if line.startswith("nuteprune: ")]
            assert len(lines) == 1
            assert re.match(rf"nuteprune: rank {rank} of 4 lost another rank .* start again", lines[0])
            assert "Traceback" not in end.text
    prune.run(load_config(None, [*overrides, f"run_dir={run_dir}"]))
    same_curve(run_dir, one)


@pytest.mark.parametrize(
    ("each", "message"),
    [
        ((["train.batch_size=3"], ["train.batch_size=3"]), "train.batch_size 3 cannot be split over 2 processes"),
        ((["seed=1"], ["seed=2"]), "rank 1 has seed=2, rank 0 1: start all ranks alike"),
        (([], ["run_dir="]), "rank 1 has run_dir=''"),
        ((["deepspeed=zero3", "model.path=/nowhere/x"],) * 2, "model.path /nowhere/x: neither a directory here"),
        ((["trian.steps=3"],) * 2, "unknown key 'trian'; did you mean 'train'"),
    ],
)
def test_a_mistake_is_one_line_of_rank_0_and_ends_all(overrides, tmp_path, each, message):
    run_dir = tmp_path / "run"
    arguments = [["prune", *overrides, f"run_dir={run_dir}", *own] for own in each]
    first, second = ranks.Group(arguments, 2, tmp_path / "logs").wait()
    assert (first.code, second.code) == (2, 2), first.text + second.text
    assert first.text.count("nuteprune: ") == len(first.text.splitlines()) == 1
    assert message in first.text
    assert second.text == ""
    assert not list(run_dir.glob("*"))


def connect_slowly(rank: int) -> None:
    """Let rank 1 need rank 0's store for a while longer, as a loaded machine does."""
    connect = dist.init_process_group

    def slow(*args, **kwargs):
        connect(*args, **kwargs)
        time.sleep(2)
        dist.distributed_c10d._get_default_store().add("connected", 1)

    if rank == 1:
        dist.init_process_group = slow


def test_rank_0_does_not_end_before_the_others_have_connected(overrides, tmp_path):
    arguments = [["prune", *overrides, f"run_dir={tmp_path / 'run'}", f"seed={seed}"] for seed in (1, 2)]
    first, second = ranks.Group(arguments, 2, tmp_path / "logs", connect_slowly).wait()
    assert (first.code, second.code) == (2, 2), first.text + second.text
    assert "rank 1 has seed=2" in first.text


def hide_data(rank: int) -> None:
    """Let rank 1 not see what rank 0 packed, as on a node without the file system."""
    if rank == 1:
        TrainingText.load = lambda self: None


def test_a_rank_that_cannot_see_the_data_is_named(overrides, tmp_path):
    arguments = ["prune", *overrides, f"run_dir={tmp_path / 'run'}", "deepspeed=zero3"]
    first, second = ranks.Group(arguments, 2, tmp_path / "logs", hide_data).wait()
    assert (first.code, second.code) == (2, 2)
    assert re.fullmatch(r"nuteprune: rank 1: .*/prepared is not seen here: run_dir must be .*\n", first.text)
