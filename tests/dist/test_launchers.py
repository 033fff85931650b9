"""Every launcher for real with two ranks, and the variables of those that need a cluster."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch.distributed as dist
from safetensors.torch import load_file

from nuteprune.__main__ import main
from nuteprune.errors import UserError
from nuteprune.parallel.distributed import World, connected, discover, first_host

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": lambda: [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", ranks.free_port(), "-m"],
    "deepspeed": lambda: [BIN / "deepspeed", "--num_gpus", "2", "--master_port", ranks.free_port(), "--module"],
    "mpirun": lambda: [BIN / "mpirun", "-n", "2", "--map-by", ":OVERSUBSCRIBE", sys.executable, "-m"],
}
PLACES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
)  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """No launcher's variables, and discover's own writes undone afterwards."""
    for name in PLACES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


PROGRAM = """
import atexit
from nuteprune.__main__ import cli
class Kept:
    def __del__(self): print("finalized", flush=True)
kept = Kept()
atexit.register(print, "exit function")
cli()
"""
"""The command line. The groups' threads outlive them; one that needs the interpreter at its end aborts the process."""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_of_every_launcher_prune_together_and_end_without_finalization(
    launcher, settings, tmp_path, environment
):
    (tmp_path / "program.py").write_text(PROGRAM)
    overrides = [*settings, "train.steps=2", "gates.importance_tokens=1", "deepspeed=zero3"]
    code, out, err = _launch(launcher, ["program", "prune", *overrides], tmp_path)
    assert code == 0, err
    assert out.count("pruned student: ") == 1
    assert err.count(" blocks of text, ") == 1
    assert "Traceback" not in err
    assert load_file(tmp_path / "run/pruned/gates.safetensors")
    assert out.count("exit function") == 2
    assert "finalized" not in out


def _launch(launcher, module, folder):
    """Run a module on two ranks: exit code of the launcher, output, messages."""
    variables = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [*map(str, LAUNCHERS[launcher]()), *module], cwd=folder, env=variables, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=ranks.HANG)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def test_a_step_of_srun(environment):
    environment.setenv("SLURM_STEP_NUM_TASKS", "5")
    environment.setenv("SLURM_PROCID", "4")
    environment.setenv("SLURM_LOCALID", "1")
    environment.setenv("SLURM_STEP_NODELIST", "node[03-04,7]")
    environment.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2),1")
    environment.setenv("SLURM_JOB_ID", "123456")
    world = discover()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (4, 5, 1, 2)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node03", "23456")
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["4", "5", "1"]
    assert discover() == world  # asked again, by its own variables
    environment.setenv("RANK", "3")
    assert discover().rank == 3  # torchrun inside the step


def test_ranks_of_mpirun_on_other_nodes_of_a_job_are_not_tasks_of_its_daemons_step(environment, tmp_path):
    """On four nodes Open MPI starts three daemons by srun, and their ranks inherit the variables of that step."""
    (tmp_path / "program.py").write_text("from nuteprune.parallel.distributed import discover\nprint(discover().size)")
    step = {"STEP_NUM_TASKS": "3", "STEP_NODELIST": "node[2-4]", "STEP_TASKS_PER_NODE": "1(x3)"}
    for name, value in (step | {"PROCID": "0", "LOCALID": "0", "JOB_ID": "7"}).items():
        environment.setenv(f"SLURM_{name}", value)
    code, out, err = _launch("mpirun", ["program"], tmp_path)
    assert (code, out.split()) == (0, ["2", "2"]), err


def test_a_batch_script_or_a_shell_of_an_allocation_is_one_process(environment):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}.items():
        environment.setenv(name, value)
    assert discover().size == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("a-b[008,010-012]", "a-b008"), ("x,y[1-2]", "x"), ("n[1-2].site,m", "n1.site")],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_half_a_set_of_variables_is_one_clear_line(environment):
    environment.setenv("WORLD_SIZE", "2")
    environment.setenv("RANK", "0")
    with pytest.raises(UserError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not: start with torchrun"):
        discover()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_a_variable_that_is_no_number_is_one_clear_line(environment, settings, capfd, name):
    places = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variable, value in (places | {name: "abc"}).items():
        environment.setenv(variable, value)
    assert main(["prune", *settings]) == 2
    assert capfd.readouterr().err == f"nuteprune: {name}=abc is not a number: start with torchrun, or unset {name}\n"


def test_two_ranks_on_one_gpu_are_a_mistake_and_no_lost_rank():
    """Which a job would be started again for; in the words of NCCL, as torch hands them on."""
    told = (
        "NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage (run with NCCL_DEBUG=WARN for details)\n"
        "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
        "Duplicate GPU detected : rank 4 and rank 0 both on CUDA device 1b000"
    )
    with pytest.raises(UserError, match="both on CUDA device 1b000: start one rank"), connected(World(), 60):
        raise dist.DistBackendError(told)
