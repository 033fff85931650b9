"""Distillation on several ranks, which share out its weights, is that of one process."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

import nuteprune
from nuteprune.__main__ import main
from nuteprune.config import load_config
from nuteprune.parallel.distributed import RankLost
from nuteprune.parallel.sharding import read_shares
from nuteprune.runs.checkpoint import Checkpoints
from nuteprune.stages import distill, export
from nuteprune.training import blocks, loop
from nuteprune.training.signals import Preempted

pytestmark = pytest.mark.xdist_group("ranks")
SETTINGS = ["distill.steps=6", "checkpoint.every=2"]
FIT = 30
"""Steps that each layer is fitted in, a tenth of what users have: they are rank 0's, whatever the ranks."""


def fit_briefly(_rank):
    blocks.STEPS = FIT


@pytest.fixture(scope="module", autouse=True)
def brief():
    """As `fit_briefly` in the process of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "STEPS", FIT)
        yield


@pytest.fixture(scope="module")
def one(finished_run, tmp_path_factory):
    """An exported run, and the same whose export was distilled by one process; to be copied, not written to."""
    top = tmp_path_factory.mktemp("distilled")
    before = shutil.copytree(finished_run, top / "before")
    export.run(load_config(before, ["tracking.progress=false"]))
    alone = shutil.copytree(before, top / "alone")
    assert main(["distill", str(alone), *SETTINGS]) == 0
    return before, alone


def weights(run):
    return load_file(run / "distill/model/model.safetensors")


def check_alike(first, second, near=1e-4):
    """Two runs have the same losses, up to a share `near`, and weights, up to ten times that.

    Six steps move no weight far: losses tell whether they learned.
    """
    losses = [[json.loads(line)["distill/loss"] for line in (run / "distill/metrics.jsonl").read_text().splitlines()]
              for run in (first, second)]  # fmt: skip
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=near)
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    assert all(two[key].sub(tensor).abs().max() < 10 * near for key, tensor in one.items())


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """The same, distilled by two ranks under ZeRO-3."""
    several = shutil.copytree(one[0], tmp_path_factory.mktemp("two") / "several")
    ranks.run(["distill", str(several), *SETTINGS, "deepspeed=zero3"], 2, several.with_name("logs"), fit_briefly)
    return several


@pytest.mark.parametrize(
    ("count", "setting"), [(2, "deepspeed="), (4, "deepspeed=zero2"), (2, "distill.deepspeed=zero3_offload")]
)
def test_ranks_learn_what_one_process_learns(count, setting, one, tmp_path):
    before, alone = one
    several = shutil.copytree(before, tmp_path / "several")
    command = ["distill", str(several), *SETTINGS, setting]
    ranks.run(command, count, tmp_path / "logs", fit_briefly)
    check_alike(alone, several)
    # From the checkpoint behind step 4 on the same number of ranks: the same bits.
    whole = (several / "distill/model/model.safetensors").read_bytes()
    shutil.rmtree(several / "distill/model")
    ended = ranks.run(command, count, tmp_path / "again")
    assert "resumed at step 4" in ended[0].text
    assert (several / "distill/model/model.safetensors").read_bytes() == whole


def watch_gathers(rank):
    """Leave beside the run how many weights DeepSpeed gathered in each step, and whether it knows their order."""
    fit_briefly(rank)
    step, seen = distill.Distilling.train_step, []

    def watched(trainer):
        from deepspeed.comm import comm

        backend, gathered = comm.cdb, []
        original = backend.all_gather_into_tensor

        def gather(*args, **named):
            gathered.append((named["output_tensor"] if named else args[0]).numel())
            return original(*args, **named)

        backend.all_gather_into_tensor = gather
        try:
            found = step(trainer)
        finally:
            backend.all_gather_into_tensor = original
        (engine,) = trainer.model.partitioning
        known = engine.optimizer.get_param_coordinator().is_complete_trace()
        seen.append((sum(gathered), known))
        Path(trainer.config.run_dir, f"gathers-{rank}.json").write_text(json.dumps(seen))
        return found

    distill.Distilling.train_step = watched


def test_the_intact_models_weights_are_gathered_once_and_ahead(one, model_dir, tmp_path):
    several = shutil.copytree(one[0], tmp_path / "several")
    file = tmp_path / "small.json"  # nothing stays whole between steps
    zero = json.loads((Path(nuteprune.__file__).parent / "ds_configs/zero3.json").read_text())
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file.write_text(json.dumps(zero))
    command = ["distill", str(several), *SETTINGS, f"deepspeed={file}", "train.micro_batch=2"]
    ranks.run(command, 2, tmp_path / "logs", watch_gathers)
    whole = sum(each.numel() for each in load_file(model_dir / "model.safetensors").values())
    for rank in range(2):
        seen = json.loads((several / "distill" / f"gathers-{rank}.json").read_text())
        assert len(seen) == 6
        assert all(known for _, known in seen[1:])
        assert {count for count, _ in seen[1:]} == {whole}


def lose_one(rank):
    """Let rank 1 be killed before its last step."""
    fit_briefly(rank)
    step = distill.Distilling.train_step

    def killed(trainer):
        if trainer.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer)

    if rank == 1:
        distill.Distilling.train_step = killed


def test_a_rank_killed_under_zero3_changes_no_bit(one, two, tmp_path):
    before, alone = one
    check_alike(alone, two)
    several = shutil.copytree(before, tmp_path / "several")
    command = ["distill", str(several), *SETTINGS, "deepspeed=zero3"]
    ended = ranks.Group(command, 2, tmp_path / "logs", lose_one).wait()
    assert [rank.code for rank in ended] == [RankLost.exit_code, -signal.SIGKILL], ended[0].text
    ended = ranks.run(command, 2, tmp_path / "again")
    assert "resumed at step 4" in ended[0].text
    results = [run / "distill/model/model.safetensors" for run in (several, two)]
    assert results[0].read_bytes() == results[1].read_bytes()


@pytest.mark.parametrize(
    ("family", "sparsity", "dtype", "near"),
    [("gemma3", 0.55, "float32", 1e-4), ("qwen3_moe", 0.375, "bfloat16", 2e-3)],  # half a unit in the last place
)
def test_models_of_other_shapes_are_shared_out_too(family, sparsity, dtype, near, exported, tmp_path):
    """A tied head, a layer that is wholly removed; experts in one tensor; recomputed activations; a narrower type."""
    alone = exported(family, sparsity, f"model.dtype={dtype}")
    several = shutil.copytree(alone, tmp_path / "several")
    command = [*SETTINGS, "train.activation_checkpointing=true"]
    assert main(["distill", str(alone), *command]) == 0
    ranks.run(["distill", str(several), *command, "deepspeed=zero3"], 2, tmp_path / "logs", fit_briefly)
    check_alike(alone, several, near)


def test_a_distilled_model_learns_from_records_on_ranks_as_in_one_process(one, tmp_path):
    records = tmp_path / "records.jsonl"
    rows = [{"prompt": f"The river of {n}", "completion": f" is {'very ' * (n % 5)}deep."} for n in range(24)]
    records.write_text("\n".join(map(json.dumps, rows)))
    found = []
    for count in (1, 2):
        run = shutil.copytree(one[1], tmp_path / f"on{count}")
        command = ["finetune", str(run), f"finetune.data={records}", "finetune.steps=6", "finetune.seq_len=64",
                   "finetune.batch_size=4", "finetune.distill=1", "finetune.lr=1e-3"]  # fmt: skip
        if count == 1:
            assert main(command) == 0
        else:
            ranks.run([*command, "deepspeed=zero3"], count, tmp_path / "logs")
        lines = (run / "instruct/metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["finetune/loss"] for line in lines])
    assert len(found[0]) == 6
    assert found[0][-1] < found[0][0]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def save_at_once(_rank):
    """Make a stage write what it has resumed, and leave."""

    def run_steps(trainer, _tracker):
        trainer.checkpoints = Checkpoints(trainer.checkpoints.directory.with_name("again"), 1)
        loop.save_checkpoint(trainer)
        raise Preempted("saved")

    loop.run_steps = run_steps


def test_a_checkpoint_goes_on_exactly_on_any_number_of_ranks(one, two, tmp_path):
    _, alone = one
    several = shutil.copytree(two, tmp_path / "several")
    shutil.rmtree(several / "distill/model")
    written = several / "distill/checkpoints/step-00000004/shares"
    sizes = {file.stat().st_size for file in written.iterdir()}
    assert len(list(written.iterdir())) == 2
    assert max(sizes) < 1.1 * min(sizes)
    command = ["distill", str(several), *SETTINGS]
    ended = ranks.Group([*command, "deepspeed=zero3"], 4, tmp_path / "four", save_at_once).wait()
    assert {e.code for e in ended} == {75}
    four = several / "distill/again/step-00000004/shares"
    assert len(list(four.iterdir())) == 4
    first, second = (tensors(directory) for directory in (written, four))
    assert {name.rpartition(":")[2] for name in first} == {"weight", "exp_avg", "exp_avg_sq", "steps"}
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert main(command) == 0
    check_alike(alone, several)


def tensors(directory):
    """What was written by however many ranks."""
    sizes = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    found = {name: torch.full(facts.size, torch.nan) for name, facts in sizes.items()}
    read_shares(found, directory)
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def test_a_share_that_is_damaged_is_told_of(one, tmp_path, caplog):
    alone = shutil.copytree(one[1], tmp_path / "alone")
    checkpoint = alone / "distill/checkpoints/step-00000004"
    (file,) = (checkpoint / "shares").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    shutil.rmtree(alone / "distill/model")
    with caplog.at_level("INFO"):
        assert main(["distill", str(alone), *SETTINGS]) == 0
    assert f"checkpoint skipped: {file} has" in caplog.text
    assert "resumed at step 2" in caplog.text
