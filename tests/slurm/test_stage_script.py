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


def worth_a_restart(tmp_path, srun: str, *torchrun: str, signalled: str = "") -> bool:
    """What the script says of srun's messages and of torchrun's on each node."""
    (tmp_path / "srun.log").write_text(srun)
    for node, text in enumerate(torchrun):
        (tmp_path / f"rank-{node}.log").write_text(text)
    functions = re.findall(r"^\w+\(\) \{.*?(?:\n\}|\})$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    command = "\n".join([*functions, f"logs={tmp_path} signalled={signalled}", "worth_a_restart"])
    return subprocess.run(["bash", "-euo", "pipefail", "-c", command]).returncode == 0


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
