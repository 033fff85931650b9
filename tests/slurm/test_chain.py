"""Runs of a tiny model on a real cluster: the chain, what interrupts it, what breaks it, and sweeps."""

from itertools import pairwise
from pathlib import Path

from slurm_cluster import wait_for

from pipeline.checkpoint import sha256

STAGES = ["prepare", "prune", "export", "evaluate"]


def finished(run, job: str, limit: float = 120) -> dict[str, str]:
    """Wait for a job's success; returns its fields."""
    fields = run.cluster.wait_job(job, limit=limit)
    assert fields["JobState"] == "COMPLETED", run.everything()
    return fields


def wait_for_step(run, step: int) -> None:
    """Wait until a checkpoint of that step or a later one is there."""
    last = run.run_dir / "checkpoints" / f"step-{step:08d}"
    wait_for(lambda: any(p.name >= last.name for p in last.parent.glob("step-*")), 60, run.everything)


def exported(run) -> str:
    return sha256(run.run_dir / "export" / "model.safetensors")


def test_whole_chain_in_order(undisturbed):
    run, jobs = undisturbed
    assert list(jobs) == STAGES
    done = [finished(run, jobs[stage]) for stage in STAGES]
    assert all(before["EndTime"] <= after["StartTime"] for before, after in pairwise(done))
    status = run.status()["stages"]
    assert [status[stage]["state"] for stage in STAGES] == ["complete"] * 4
    assert [status[stage]["job"]["number"] for stage in STAGES] == list(jobs.values())
    assert run.submit_text().splitlines() == [f"{stage}: complete" for stage in STAGES]
    assert (run.run_dir / "evaluate" / "report.md").is_file()


def test_requeued_in_mid_prune_exports_the_same_bits(undisturbed, tiny_run):
    run = tiny_run()
    jobs = run.submit()
    wait_for_step(run, 20)
    again = run.submit()
    assert not set(again) & {"prune", "export", "evaluate"}  # queued and running jobs are not submitted twice
    run.cluster.run("scontrol", "requeue", jobs["prune"])
    assert int(finished(run, jobs["prune"])["Restarts"]) == 1
    finished(run, jobs["evaluate"])
    assert "resumed at step" in run.log(f"prune-{jobs['prune']}")
    assert exported(run) == exported(undisturbed[0])


def test_time_limit_saves_and_goes_on(undisturbed, tiny_run):
    run = tiny_run()
    # SLURM counts limits in minutes: the signal comes right after the start.
    jobs = run.submit(PRUNE_TIME="1", SIGNAL_SECONDS="45")
    ended = finished(run, jobs["prune"])
    assert int(ended["Restarts"]) >= 1
    log = run.log(f"prune-{jobs['prune']}")
    assert "the ranks save and leave" in log
    assert "SIGUSR1 at step" in log
    finished(run, jobs["export"])
    assert exported(run) == exported(undisturbed[0])


def test_failing_stage_stops_the_chain_and_status_says_why(tiny_run):
    run = tiny_run(steps=5)
    jobs = run.submit("sparsity.target=0.99")
    failed = run.cluster.wait_job(jobs["prune"])
    assert (failed["JobState"], failed["ExitCode"], failed["Restarts"]) == ("FAILED", "2:0", "0")
    assert run.cluster.wait_job(jobs["evaluate"])["JobState"] == "CANCELLED"
    stages = run.status()["stages"]
    assert [stages[stage]["state"] for stage in STAGES] == ["complete", "failed", "cancelled", "cancelled"]
    assert "rank 0 on node" in stages["prune"]["error"]
    assert "sparsity.target 0.99 is out of reach" in stages["prune"]["error"]


def test_sweep_as_an_array(tiny_run, tmp_path):
    run = tiny_run(steps=20)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("- {sparsity.target: 0.2}\n- {sparsity.target: 0.3, seed: 1}\n")
    printed = run.submit_text("--sweep", str(sweep))
    job = printed.split("job ")[1].split(",")[0]
    for element in (f"{job}_0", f"{job}_1"):
        finished(run, element)
    names = ["sparsity.target=0.2", "sparsity.target=0.3,seed=1"]
    for name in names:
        assert (Path(f"{run.run_dir}-sweep") / name / "evaluate" / "manifest.json").is_file()
