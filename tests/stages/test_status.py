"""`nuteprune status`: a run's progress from its files, and what is told where SLURM has forgotten or never knew it."""

import json

import pytest

from nuteprune.__main__ import main
from nuteprune.config import load_config
from nuteprune.runs import jobs
from nuteprune.runs.lock import alone
from nuteprune.stages import prune, status


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    """No cluster, whatever this machine has."""
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
    monkeypatch.setenv("PATH", str(tmp_path))


def test_progress_of_a_real_run(settings, tmp_path, capsys):
    run_dir = tmp_path / "run"
    prune.run(load_config(None, [*settings, "train.steps=6", "checkpoint.every=2"]))
    assert main(["status", str(run_dir)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{run_dir}, sparsity 20%"
    assert told[2:5] == [
        f"  prune     done        {run_dir / 'pruned'}",
        "  export    not started",
        "  evaluate  not started",
    ]
    assert told[5:] == [f"next: nuteprune export {run_dir}"]
    (run_dir / "pruned" / "manifest.json").unlink()  # as if it were still at work
    assert main(["status", str(run_dir), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    found = stages["prune"]["progress"]
    assert (found["step"], found["total"], found["checkpoint"]) == (6, 6, 4)
    assert "seconds_left" not in found
    assert found["expected_sparsity"] == pytest.approx(0.2, abs=0.02)
    assert found["tokens_per_s"] > 0
    assert [stages[stage]["state"] for stage in ("prepare", "prune", "export")] == [
        "not started",
        "stopped",
        "not started",
    ]
    with alone(run_dir, "prune"):
        assert main(["status", str(run_dir)]) == 0
        assert "prune     running" in (told := capsys.readouterr().out)
        assert "0:00:00 left" in told
    with pytest.raises(OSError, match="no space"), alone(run_dir, "prune"):
        raise OSError("no space")
    assert main(["status", str(run_dir)]) == 0
    assert "error: no space" in capsys.readouterr().out.partition("prune     failed")[2]
    (run_dir / ".prune.lock").unlink()
    assert main(["status", str(run_dir)]) == 0
    assert f"step 6 of 6, sparsity {found['expected_sparsity']:.1%} (target 20.0%)" in capsys.readouterr().out


def test_time_left_and_a_line_half_written(tmp_path):
    lines = [{"step": s, "total": 100, "prune/loss": 1.0, "prune/step_s": 2.0, "prune/tokens_per_s": 5.0}
             for s in range(25)]  # fmt: skip
    written(tmp_path / "metrics.jsonl", "\n".join(map(json.dumps, lines)) + '\n{"step": 25, "to')
    found = status.progress(tmp_path, "prune")
    assert (found["step"], found["seconds_left"], found["checkpoint"]) == (25, 150, None)


def test_records_of_another_form_are_left_out(tmp_path, capsys):
    good = {"step": 3, "total": 9, "prune/loss": 1.0, "prune/step_s": 2.0, "prune/tokens_per_s": 5.0}
    lines = [good, {"prune/loss": 1.0}, good | {"prune/step_s": None}, good | {"prune/expected_sparsity": 0.1}, [1]]
    run = tmp_path / "run"
    written(run / "metrics.jsonl", "\n".join(map(json.dumps, lines)))
    (run / "checkpoints" / "step-old").mkdir(parents=True)
    (run / "jobs.tsv").write_bytes(b"prune\t\xff\n")
    assert main(["status", str(run)]) == 0
    assert "step 4 of 9, 5 tokens/s\n" in capsys.readouterr().out


def test_table_for_the_shell(tmp_path, capsys):
    written(tmp_path / "run" / "jobs.tsv", "prepare\t7\nprune\t8\nprune\t9\n")
    written(tmp_path / "run" / "prepared" / "manifest.json", "{}")
    assert main(["status", str(tmp_path / "run"), "--tsv"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows == [["run_dir", str(tmp_path / "run")], ["prepare", "done", "7"], ["prune", "not started", "9"],
                    ["export", "not started", ""], ["evaluate", "not started", ""]]  # fmt: skip


def test_stages_that_were_started_by_hand(tmp_path, capsys):
    """Their settings are not in config.yaml, which only pruning writes; `submit` asks for the chain alone."""
    run_dir = tmp_path / "run"
    step = json.dumps({"step": 3, "total": 10, "distill/loss": 1.0, "distill/step_s": 2.0, "distill/tokens_per_s": 5.0})
    written(run_dir / "distill" / "metrics.jsonl", step)
    written(run_dir / "finetune-0.1" / "tuned" / "manifest.json", "{}")
    written(run_dir / "recover-0.1" / "metrics.jsonl", "")
    written(run_dir / "finetune_data" / "records.json", "[]")
    assert main(["status", str(run_dir), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert {stage: found["state"] for stage, found in stages.items()} == {
        "prepare": "not started", "prune": "not started", "recover-0.1": "not started", "finetune-0.1": "done",
        "export": "not started", "distill": "stopped", "evaluate": "not started",
    }  # fmt: skip
    assert list(stages) == ["prepare", "prune", "recover-0.1", "finetune-0.1", "export", "distill", "evaluate"]
    assert (stages["distill"]["progress"]["step"], stages["distill"]["asked"]) == (4, False)
    assert main(["status", str(run_dir)]) == 0
    assert "step 4 of 10, 5 tokens/s" in capsys.readouterr().out
    assert main(["status", str(run_dir), "--tsv"]) == 0
    rows = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows == ["run_dir", "prepare", "prune", "export", "evaluate"]
    assert main(["status", str(run_dir), "--json", f"run_dir={run_dir}", "distill.steps=10"]) == 0
    assert "asked" not in json.loads(capsys.readouterr().out)["stages"]["distill"]


@pytest.mark.parametrize("begun", [False, True])
def test_stages_that_wait_in_the_queue(tmp_path, capsys, begun):
    """Before pruning has written the run's settings, and where they ask for less than was submitted later."""
    run_dir = tmp_path / "run"
    rows = "".join(f"{stage}\t{number}\n" for number, stage in enumerate(["recover-0.1", "finetune", "distill", "x"]))
    written(run_dir / "jobs.tsv", rows)
    if begun:
        written(run_dir / "config.yaml", "finetune: {data: records.json, sparsity: 0.1}")
    assert main(["status", str(run_dir), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert list(stages) == ["prepare", "prune", "recover-0.1", "finetune", "export", "distill", "evaluate"]
    assert stages["distill"]["job"]["number"] == "2"
    assert stages["finetune"].get("asked", True) == begun


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_of_a_sweep_is_named_as_submit_does(tmp_path, capsys, begun):
    run_dir = tmp_path / "mine-sweep" / 'sparsity.target=0.3,data.source="c4.jsonl"'
    written(run_dir / "metrics.jsonl", "")
    if begun:
        written(run_dir / "config.yaml", "finetune: {data: records.json}")
    assert main(["status", str(run_dir), "--tsv"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"run_dir\t{run_dir}\n")
    assert ("finetune" in told) == begun


def test_what_a_whole_run_does_and_leaves_out(tmp_path, capsys):
    run_dir = tmp_path / "run"
    written(run_dir / "run.yaml", "")
    written(run_dir / "left-out.json", json.dumps({"distill": "needs 31 GB, 22 are free"}))
    written(run_dir / "pruned" / "manifest.json", "{}")
    written(run_dir / "prepared" / "manifest.json", "{}")
    with alone(run_dir, "run"):
        assert main(["status", str(run_dir)]) == 0
        assert "  export    running\n" in capsys.readouterr().out
    assert main(["status", str(run_dir)]) == 0
    told = capsys.readouterr().out
    assert "  distill   left out    needs 31 GB, 22 are free\n" in told
    assert told.endswith(f"next: nuteprune run --config {run_dir / 'run.yaml'}\n")


def test_no_run_is_named(capsys):
    assert main(["status"]) == 2
    assert "which run?" in capsys.readouterr().err


def test_a_directory_that_is_not_there_is_no_run(tmp_path, capsys):
    assert main(["status", str(tmp_path / "typo")]) == 2
    assert f"no directory {tmp_path / 'typo'}" in capsys.readouterr().err


SRUN = """\
srun: error: node2: task 1: {first}
srun: error: node1: task 0: Exited with exit code 75
"""
TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    g()\nValueError: no such thing\n'


@pytest.mark.parametrize(
    ("first", "rank_1", "error"),
    [
        ("Exited with exit code 1", f"12:00:00 step\n{TRACEBACK}", "rank 1 on node2: ValueError: no such thing"),
        ("Killed", "12:00:00 step\n", "rank 1 on node2: Killed"),
        ("Exited with exit code 2", "", "rank 1 on node2: Exited with exit code 2"),
    ],
)
def test_first_error_is_that_of_the_rank_that_failed_first(tmp_path, first, rank_1, error):
    logs = tmp_path / "logs" / "prune-12"
    written(logs / "srun.log", SRUN.format(first=first))
    written(logs / "rank-1.log", rank_1)
    assert jobs.first_error(tmp_path, jobs.SlurmJob("12", "FAILED")) == error


def test_a_mistake_found_by_another_rank_is_told_by_the_first(tmp_path):
    logs = tmp_path / "logs" / "prune-12"
    written(logs / "srun.log", SRUN.format(first="Exited with exit code 2"))
    written(logs / "rank-0.log", "nuteprune: rank 1: model.path /x: no such file\n")
    written(logs / "rank-1.log", "")
    found = jobs.first_error(tmp_path, jobs.SlurmJob("12", "FAILED"))
    assert found == "rank 1 on node2: nuteprune: rank 1: model.path /x: no such file"


def test_a_job_that_no_rank_ever_began(tmp_path):
    written(tmp_path / "logs" / "prune-12.log", "/spool/script: line 9: my.env: cannot open\nbye\n")
    assert "my.env: cannot open" in jobs.first_error(tmp_path, jobs.SlurmJob("12", "FAILED"))
    assert jobs.first_error(tmp_path, jobs.SlurmJob("13", "CANCELLED")) == ""


def test_a_job_that_gave_up(tmp_path):
    log = "job 12, restart 0: prune\nslurmstepd: error: requeue\njob 12, restart 1: prune\ngiven up: 9\n"
    written(tmp_path / "logs" / "prune-12.log", log)
    assert jobs.first_error(tmp_path, jobs.SlurmJob("12", "FAILED")) == "given up: 9"
