"""Runs of a tiny model on a real cluster: the chain, what interrupts it, what breaks it, and sweeps."""

import os
import re
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from slurm_cluster import wait_for

from nuteprune.runs.checkpoint import sha256
from nuteprune.runs.jobs import submitted

# One worker of pytest-xdist starts the cluster and the run that others are compared with.
pytestmark = pytest.mark.xdist_group("slurm")
STAGES = ["prepare", "prune", "export", "distill", "finetune", "evaluate"]


def finished(run, job: str, limit: float = 300) -> dict[str, str]:
    """Wait for a job's success; returns its fields."""
    fields = run.cluster.wait_job(job, limit=limit)
    assert fields["JobState"] == "COMPLETED", run.everything()
    return fields


def wait_for_step(run, step: int) -> None:
    """Wait until a checkpoint of that step or a later one is there."""
    last = run.run_dir / "checkpoints" / f"step-{step:08d}"
    wait_for(lambda: any(p.name >= last.name for p in last.parent.glob("step-*")), 180, run.everything)


def student(run) -> list[str]:
    return [
        sha256(run.run_dir / "pruned" / name) for name in ("gates.safetensors", "adapter/adapter_model.safetensors")
    ]


def test_whole_chain_in_order(undisturbed):
    run, jobs = undisturbed
    assert list(jobs) == STAGES
    done = [finished(run, jobs[stage]) for stage in STAGES]
    assert all(before["EndTime"] <= after["StartTime"] for before, after in pairwise(done))
    status = run.status()["stages"]
    assert [status[stage]["state"] for stage in STAGES] == ["done"] * len(STAGES)
    assert [status[stage]["job"]["number"] for stage in STAGES] == list(jobs.values())
    assert run.submit_text().splitlines() == [f"{stage}: done" for stage in STAGES]
    assert (run.run_dir / "evaluate" / "report.md").is_file()


def leave_before_time_limit(run, job: str) -> None:
    """Move a job's time limit to less than two minutes from now, and wait for SLURM's signal.

    The ranks are held meanwhile, so that they cannot finish first: SLURM looks at time limits every 30 s.
    """
    ranks = [run.cluster.pid(job, rank) for rank in (0, 1)]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    hours, minutes, _ = run.cluster.job(job)["RunTime"].split(":")
    limit = 60 * int(hours) + int(minutes) + 2
    run.cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={limit}")
    wait_for(lambda: "the ranks save and leave" in run.log(f"prune-{job}"), 90, run.everything)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    # 143 where srun ended the rank that was last to leave.
    requeued = r"requeued after exit code (75|143 \(signal from SLURM)"
    wait_for(lambda: re.search(requeued, run.log(f"prune-{job}")), 90, run.everything)
    run.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=60")


def test_interruptions_change_no_bit(undisturbed, tiny_run):
    """A rank killed, and told to leave before its time limit: the student is that of the undisturbed run."""
    run = tiny_run()
    # Not one restart without progress is allowed.
    prune = run.submit("--from", "prune", PRUNE_TIME="60", SIGNAL_SECONDS="120", MAX_RESTARTS="0")["prune"]
    assert not run.submit()  # queued and running jobs are not submitted twice
    wait_for_step(run, 10)
    os.kill(run.cluster.pid(prune, rank=1), signal.SIGKILL)
    wait_for_step(run, 20)
    leave_before_time_limit(run, prune)
    assert int(finished(run, prune)["Restarts"]) == 2
    log = run.log(f"prune-{prune}")
    assert "Killed" in log
    assert "SIGUSR1 at step" in log
    assert student(run) == student(undisturbed[0])


def test_lost_node_is_survived_on_the_other_one(tiny_run):
    run = tiny_run()
    jobs = run.submit("--from", "prune", PRUNE_NODES="1-2")
    wait_for_step(run, 10)
    assert run.cluster.job(jobs["prune"])["NumNodes"] == "2"
    run.cluster.crash_node("node2")
    try:
        ended = finished(run, jobs["prune"])
    finally:
        run.cluster.start_node("node2")
    assert ended["NodeList"] == "node1"
    assert "resumed at step" in run.log(f"prune-{jobs['prune']}")
    run.cluster.run("scancel", jobs["export"])


def test_restarts_without_progress_have_an_end(tiny_run):
    run = tiny_run()
    prune = run.submit("--from", "prune", PRUNE_NODES="1", MAX_RESTARTS="0")["prune"]
    wait_for(lambda: "stage prune" in run.log(f"prune-{prune}"), 60, run.everything)
    run.cluster.run("scontrol", "requeue", prune)
    assert run.cluster.wait_job(prune, "FAILED")["Restarts"] == "1"
    assert "given up: 1 restarts in a row without a new checkpoint" in run.log(f"prune-{prune}")
    assert "given up" in run.status()["stages"]["prune"]["error"]


def test_failing_stage_stops_the_chain_and_status_says_why(tiny_run):
    run = tiny_run()
    jobs = run.submit(
        "--from", "prune", "sparsity.target=0.99", "gates.units=[ffn]", PRUNE_NODES="1", LAUNCHER="torchrun"
    )
    failed = run.cluster.wait_job(jobs["prune"])
    assert (failed["JobState"], failed["Restarts"]) == ("FAILED", "0")
    assert run.cluster.wait_job(jobs["evaluate"])["JobState"] == "CANCELLED"
    stages = run.status()["stages"]
    assert {stage: found["state"] for stage, found in stages.items()} == {
        "prepare": "not started", "prune": "failed", "export": "cancelled", "evaluate": "cancelled",
    }  # fmt: skip
    assert "sparsity.target 0.99 is out of reach" in stages["prune"]["error"]


def test_sweep_as_an_array(tiny_run, tmp_path):
    """Its last element, whose id is the array's, loses a rank and is requeued alone."""
    run = tiny_run(steps=30)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("- {sparsity.target: 0.2, train.steps: 10}\n- {sparsity.target: 0.3, distill.steps: 4}\n")
    printed = run.submit_text("--sweep", str(sweep), PRUNE_NODES="1")
    job = printed.split("job ")[1].split(",")[0]
    first, second = (
        Path(f"{run.run_dir}-sweep") / name
        for name in ("sparsity.target=0.2,train.steps=10", "sparsity.target=0.3,distill.steps=4")
    )
    wait_for(lambda: list((second / "checkpoints").glob("step-*")), 180, run.everything)
    os.kill(run.cluster.pid(job, rank=0), signal.SIGKILL)
    assert finished(run, f"{job}_1")["Restarts"] == "1"
    assert finished(run, f"{job}_0")["Restarts"] == "0"
    assert all((each / "evaluate" / "manifest.json").is_file() for each in (first, second))
    assert (second / "distill" / "model" / "manifest.json").is_file()
    assert submitted(second)["prune"] == f"{job}_1"


def test_rungs_are_recovered_side_by_side(tiny_run):
    run = tiny_run(steps=20)
    settings = ("--from", "prune", "recover.ladder=[0.1,0.15]", "recover.steps=4", "export.ladder=[0.1,0.15]")
    jobs = run.submit(*settings, PRUNE_NODES="1")
    assert list(jobs) == ["prune", "recover-0.1", "recover-0.15", "export"]
    fields = {stage: finished(run, job) for stage, job in jobs.items()}
    for rung in ("recover-0.1", "recover-0.15"):
        assert fields["prune"]["EndTime"] <= fields[rung]["StartTime"]
        assert fields[rung]["EndTime"] <= fields["export"]["StartTime"]
        assert (run.run_dir / rung / "tuned" / "manifest.json").is_file()
        card = run.run_dir / "ladder" / rung.removeprefix("recover-") / "README.md"
        assert "| Recovered | 4 steps" in card.read_text()
    again = run.submit_text(*settings, "--from", "recover", PRUNE_NODES="1").splitlines()
    assert [line.split(": job ")[0] for line in again[:3]] == ["recover-0.1", "recover-0.15", "export"]
    assert ["after job" in line for line in again[:3]] == [False, False, True]
