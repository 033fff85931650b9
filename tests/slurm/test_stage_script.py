"""Which ends of a stage are worth a restart: stage.sbatch on what srun and torchrun write. Needs no SLURM."""

import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "stage.sbatch"
FAILED = """
============================================================
nuteprune FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-25_16:00:00
  rank      : 3 (local_rank: 3)
  exitcode  : {other} (pid: 12){space}
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-25_16:00:00
  rank      : 1 (local_rank: 1)
  exitcode  : {root} (pid: 11){space}
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""

JOB = """\
SLURM_JOB_NUM_NODES=2 SLURM_GPUS_ON_NODE=8 SLURM_NTASKS=2 SLURM_JOB_ID=1 MASTER_ADDR=a MASTER_PORT=1
LAUNCHER=torchrun PYTHON=python restart=0"""


def in_the_script(*lines: str) -> subprocess.CompletedProcess:
    """Runs lines after the script's functions."""
    functions = re.findall(r"^\w+\(\) \{.*?(?:\n\}|\})$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    command = ["bash", "-euo", "pipefail", "-c", "\n".join([*functions, *lines])]
    return subprocess.run(command, capture_output=True, text=True)


def worth_a_restart(tmp_path, srun: str, *torchrun: str, signalled: str = "") -> bool:
    """What the script says of srun's messages and of torchrun's on each node."""
    (tmp_path / "srun.log").write_text(srun)
    for node, text in enumerate(torchrun):
        (tmp_path / f"rank-{node}.log").write_text(text)
    return in_the_script(f"logs={tmp_path} signalled={signalled}", "worth_a_restart").returncode == 0


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        ("prepare", False), ("prune", True), ("recover-0.1", True), ("finetune", True), ("export", False),
        ("distill", True), ("evaluate", False),
    ],
)  # fmt: skip
def test_torchrun_starts_what_several_ranks_run(tmp_path, stage, ranks):
    """A job of two nodes of 8 GPUs, as each of a sweep is, in which all stages run."""
    done = in_the_script(f"{JOB} logs={tmp_path} signalled=; srun() {{ echo $*; }}; launch {stage} run_dir=x")
    assert f"nuteprune {stage.partition('-')[0]} run_dir=x" in done.stdout
    assert ("torch.distributed.run --nnodes=2 --nproc-per-node=8" in done.stdout) == ranks
    assert f"--ntasks={2 if ranks else 1} " in done.stdout


def test_a_signal_while_a_stage_writes_its_result_ends_the_job_before_the_next_one(tmp_path):
    """In a sweep's element, which would run on to its time limit and be lost: SLURM requeues no job that reached it."""
    (tmp_path / "srun.log").touch()
    job = f"{JOB} logs={tmp_path} signalled=1; srun() {{ echo $*; }}"
    done = in_the_script(job, "launch evaluate run_dir=x; worth_a_restart && echo again $code")
    assert done.stdout == "again 75\n"


def test_a_signal_before_the_first_stage_requeues_the_job(tmp_path):
    """As while a container's image is pulled, for the step that logs the versions."""
    (tmp_path / "cluster.env").write_text("PYTHON=python\n")
    job = (
        "export SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node1; srun() { kill -USR1 $$; }; "
        'scontrol() { [[ $1 == -o ]] && echo JobState=RUNNING || echo "$*"; }; '
        f"set -- {tmp_path}/cluster.env prune {tmp_path}/run; source {SCRIPT}"
    )
    done = subprocess.run(["bash", "-c", job], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (75, "requeue 7", "")


@pytest.mark.parametrize(("away", "told"), [(3, "requeue 7"), (99, "not requeued: SLURM's controller does not answer")])
def test_a_controller_that_is_away_for_a_moment_is_asked_again(tmp_path, away, told):
    """As while it is restarted. The ranks have saved: a job that ends here instead takes the whole chain with it."""
    (tmp_path / "srun.log").touch()
    scontrol = (
        f"scontrol() {{ echo >>{tmp_path}/asked; (($(wc -l <{tmp_path}/asked) > {away})) || return 1; "
        '[[ $1 == requeue ]] && echo "$*" || echo JobState=RUNNING; }'
    )
    done = in_the_script(f"logs={tmp_path} job=7 code=75 signalled=1; sleep() {{ :; }}; {scontrol}; requeue")
    assert done.returncode == 75, done.stderr
    assert done.stdout.splitlines()[-1].endswith(told)


def test_restarts_without_progress_are_counted_from_the_first_start_that_came_so_far(tmp_path):
    """SLURM counts one that a node's prolog ended too, before this script began."""
    job = f"run_dir={tmp_path}/run logs={tmp_path} MAX_RESTARTS=1"
    starts = [in_the_script(f"{job} restart={number}", "count_restart") for number in (1, 2, 3)]
    assert [done.returncode for done in starts] == [0, 0, 1]
    assert "given up: 2 restarts in a row" in starts[2].stdout
    assert not starts[0].stderr


@pytest.mark.parametrize(
    ("said", "again"),
    [
        ("Exited with exit code 75", True),
        ("Exited with exit code 2", False),
        ("Exited with exit code 1", False),
        ("Killed", True),
        ("Aborted (core dumped)", True),
    ],
)
def test_srun_starts_the_ranks(tmp_path, said, again):
    assert worth_a_restart(tmp_path, f"srun: error: node1: task 1: {said}\n") == again


@pytest.mark.parametrize(
    ("nodes", "again"),
    [
        ([(75, 75)], True),
        ([(-6, -6)], True),  # NCCL's watchdog aborts a rank that lost another
        ([(-9, -6)], True),  # the lost rank itself
        ([(1, -6)], False),  # failed by itself; what NCCL did to the others is its consequence
        ([(2, 75)], False),
        ([(-6, -6), (1, -15)], False),  # one node sees the consequence first, the other the cause
        ([(-9, -9), (75, 75)], True),
    ],
)
def test_torchrun_starts_the_ranks(tmp_path, nodes, again):
    logs = ["some output\n" + FAILED.format(root=root, other=other, space=" ") for root, other in nodes]
    assert worth_a_restart(tmp_path, "srun: error: node1: task 0: Exited with exit code 1\n", *logs) == again


def test_torchrun_that_says_nothing_is_not_worth_it(tmp_path):
    assert not worth_a_restart(tmp_path, "srun: error: node1: task 0: Exited with exit code 1\n", "Traceback …\n")
    assert worth_a_restart(tmp_path, "srun: error: node1: task 0: Exited with exit code 1\n", signalled="1")
