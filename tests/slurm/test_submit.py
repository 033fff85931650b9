"""What submit.sh would submit, held against golden files, and what it refuses. Needs no SLURM.

After a wanted change: `UPDATE_GOLDEN=1 python -m pytest tests/slurm/test_submit.py`, and read the difference.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CPU = """\
PYTHON={python}
SBATCH_FLAGS=(--account=me --partition=cpu)
PRUNE_NODES=${{PRUNE_NODES:-2-4}} PRUNE_GPUS=0 PRUNE_TIME=02:00:00
PREPARE_TIME=10 EXPORT_TIME=20 EVALUATE_TIME=30
EXPORT_FLAGS=(--mem=64G "--constraint=big mem")
"""


def submit(*arguments, **variables) -> subprocess.CompletedProcess:
    environment = {"PYTHON": sys.executable, **os.environ, **variables}
    command = ["slurm/submit.sh", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def files(tmp_path):
    """A configuration, a cluster file and a sweep in an empty directory, as arguments of submit.sh."""
    (tmp_path / "run.yaml").write_text("run_dir: runs/mine\nmodel: {path: /models/mine}\n")
    (tmp_path / "cpu.env").write_text(CPU.format(python=sys.executable))
    (tmp_path / "sweep.yaml").write_text("- {sparsity.target: 0.2}\n- {sparsity.target: 0.3}\n- {seed: 1}\n")
    return ["--config", tmp_path / "run.yaml", "--cluster", tmp_path / "cpu.env"]


def check(name: str, done: subprocess.CompletedProcess, top: Path) -> None:
    assert done.returncode == 0, done.stderr
    printed = done.stdout.replace(str(top), "TOP").replace(str(ROOT), "PROJECT")
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(printed)
    assert printed.splitlines() == golden.read_text().splitlines()


def test_chain_on_gpus_with_the_planners_figures(tmp_path):
    arguments = ["--config", "pipeline/recipes/llama3.1-70b.yaml", "--cluster", "slurm/clusters/example.env"]
    check("submit_70b", submit(*arguments, "--dry-run", "run_dir=runs/llama3.1-70b"), tmp_path)
    assert not (ROOT / "runs/llama3.1-70b").exists()


def test_what_the_cluster_file_says_wins_over_the_planner(tmp_path):
    """Time and memory of pruning; two words on memory would contradict each other."""
    cluster = tmp_path / "gpu.env"
    example = (ROOT / "slurm/clusters/example.env").read_text()
    cluster.write_text(f"{example}\nPRUNE_TIME=10 PRUNE_FLAGS=(--mem-per-gpu=40G)\n")
    done = submit("--cluster", cluster, "--dry-run", "recipe=gemma3-1b", f"run_dir={tmp_path}/run")
    prune = done.stdout.splitlines()[1].split()
    assert "--time=10" in prune
    assert [word for word in prune if word.startswith("--mem")] == ["--mem-per-gpu=40G"]


def test_leave_to_run_code_is_given_to_the_jobs_beside_the_plan(tmp_path):
    """No file can hold it, as plan.yaml does what else was said."""
    arguments = ["--cluster", "slurm/clusters/example.env", "--dry-run", "recipe=gemma3-1b", f"run_dir={tmp_path}/run"]
    done = submit(*arguments, "evaluate.trust_remote_code=true", "seed=1")
    for line in done.stdout.splitlines():
        assert line.endswith(f"--config {tmp_path}/run/plan/plan.yaml evaluate.trust_remote_code=true")
    assert "run-evaluate" in done.stdout


def test_chain_on_cpus(files, tmp_path):
    check("submit_cpu", submit(*files, "--dry-run", "sparsity.target=0.3"), tmp_path)


def test_a_line_that_the_example_proposes_may_be_the_last_one(files, tmp_path):
    """`set -e` ends a script whose `source` ends with a condition that does not hold, and says nothing."""
    cluster = tmp_path / "cpu.env"
    example = (ROOT / "slurm/clusters/example.env").read_text()
    proposed = [line[line.index("[[") :] for line in example.splitlines() if line.startswith("#") and "[[" in line]
    assert len(proposed) == 2
    for line in proposed:
        cluster.write_text(f"{CPU.format(python=sys.executable)}{line}\n")
        done = submit(*files, "--dry-run")
        assert (done.returncode, len(done.stdout.splitlines())) == (0, 4)


def test_gpus_with_their_kind_are_one_clear_line(files):
    done = submit(*files, "--dry-run", EVALUATE_GPUS="a100:8")
    told = "EVALUATE_GPUS=a100:8 is not a number: name the kind in EVALUATE_FLAGS, as in (--gpus-per-node=a100:8)"
    assert (done.returncode, done.stderr, done.stdout) == (2, f"submit.sh: {told}\n", "")


def test_rungs_side_by_side(files, tmp_path):
    check("submit_recover", submit(*files, "--dry-run", "recover.ladder=[0.1,0.2]"), tmp_path)


def test_distillation_stands_behind_export_with_what_pruning_has(files):
    jobs = [line.split() for line in submit(*files, "--dry-run", "distill.steps=100").stdout.splitlines()]
    assert [job[3] for job in jobs][-3:] == [f"--job-name=mine-{name}" for name in ("export", "distill", "evaluate")]
    assert {"--dependency=afterok:EXPORT_JOB", "--nodes=2-4", "--time=02:00:00"} <= set(jobs[-2])


def test_a_stage_asked_for_after_the_chain_was_complete_is_named(files, tmp_path):
    for stage in ("pruned", "export", "evaluate"):  # not prepared: pruning needed none
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "manifest.json").write_text("{}")
    done = submit(*files, f"run_dir={tmp_path}/run", "distill.steps=100")
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["prune: done", "export: done", "evaluate: done"]
    told = "distill: not submitted, evaluate behind it is done or under way (add --from distill)\n"
    assert done.stderr == told
    done = submit(*files, f"run_dir={tmp_path}/run", "distill.steps=100", "--dry-run", "--from", "distill")
    assert [line.split()[3][11:] for line in done.stdout.splitlines()] == ["run-distill", "run-evaluate"]
    assert not done.stderr


def test_distillation_gets_its_own_needs_of_the_planner(tmp_path):
    """70B on two nodes: a checkpoint takes more host memory than pruning, 1,080 steps more time than 120."""
    arguments = ["--cluster", "slurm/clusters/example.env", "--dry-run", "recipe=llama3.1-70b", "train.steps=120"]
    done = submit(*arguments, "distill.steps=1080", f"run_dir={tmp_path}/run")
    (line,) = (line for line in done.stdout.splitlines() if "run-distill" in line)
    given = dict(word.split("=", 1) for word in line.split() if "=" in word)
    assert int(given["--mem"].removesuffix("G")) > 438  # two copies of a node's half of weights and moments
    assert int(given["--time"].partition(":")[0]) > 1


def test_from_a_stage_with_a_variable_set_once(files, tmp_path):
    check("submit_from_prune", submit(*files, "--dry-run", "--from", "prune", PRUNE_NODES="1"), tmp_path)


def test_sweep(files, tmp_path):
    check("submit_sweep", submit(*files, "--dry-run", "--sweep", tmp_path / "sweep.yaml"), tmp_path)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("{sparsity.tarket: 0.3}", "entry 2: override 'sparsity.tarket=0.3': unknown key"),
        ("{sparsity.target: 3}", "entry 2: sparsity.target: must be"),
        ("{evaluate.trust_remote_code: true}", "sets evaluate.trust_remote_code, which no file can"),
        ("{evaluate: {trust_remote_code: true}}", "sets evaluate.trust_remote_code, which no file can"),
        ("&a {seed: *a}", "is not valid YAML"),
        ("{seed: 1}", "entry 2 would write where entry 1 does: both have settings seed=1"),
        ("{export.output: x}\n- {seed: 3, export.output: x}", "entry 3 would write where entry 2 does"),
        (f"{{data.source: /{'long/' * 60}}}", "entry 2: its settings name its directory, and have 315 bytes"),
    ],
)
def test_a_wrong_entry_of_a_sweep_submits_nothing(files, tmp_path, entry, told):
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"- {{seed: 1}}\n- {entry}\n")
    done = submit(*files, "--dry-run", "--sweep", sweep)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("key", ["export.output", "evaluate.output"])
def test_a_directory_that_all_runs_of_a_sweep_would_write_to_submits_nothing(files, tmp_path, key):
    done = submit(*files, "--dry-run", "--sweep", tmp_path / "sweep.yaml", f"{key}={tmp_path}/one")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"entry 2 would write where entry 1 does: both have {key} {tmp_path}/one" in done.stderr


def test_a_sweep_may_be_written_as_a_run_is(files, tmp_path):
    (tmp_path / "sweep.yaml").write_text("- {sparsity: {target: 0.2}}\n- sparsity.target: 0.3\n- {seed: 1}\n")
    check("submit_sweep", submit(*files, "--dry-run", "--sweep", tmp_path / "sweep.yaml"), tmp_path)


def test_without_slurm(files, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("bash", "realpath", "sed", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    done = submit(*files, PATH=str(tmp_path / "bin"))
    assert done.returncode == 2
    assert "no sbatch here" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_commands_that_it_proposes_hold_a_path_with_blanks(files, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    run_dir = f"{tmp_path}/my run"
    done = submit(*files, f"run_dir={run_dir}", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    (watch,) = (line for line in done.stdout.splitlines() if line.startswith("watch:"))
    assert shlex.split(watch)[-2:] == ["status", run_dir]
    on_the_cluster = shlex.split(done.stdout.splitlines()[-1])[-1]
    assert shlex.split(on_the_cluster)[-2:] == ["--logdir", f"{run_dir}/tensorboard"]


def test_flags_with_an_equals_sign(files, tmp_path):
    config, cluster = (f"{flag}={value}" for flag, value in (files[:2], files[2:]))
    done = submit(config, cluster, "--dry-run", f"--sweep={tmp_path}/sweep.yaml")
    check("submit_sweep", done, tmp_path)
    assert "run.yaml" in done.stdout
    done = submit(config, cluster, "--dry-run", "--from=evaluate", "run_dir=runs/a=b")
    assert [line.split()[3] for line in done.stdout.splitlines()] == ["--job-name=a=b-evaluate"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--from", "pruning"], "this run has the stages prepare prune"),
        (["--config"], "--config needs a value"),
        (["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["--quick"], "unknown argument '--quick'"),
        (["sparsity.traget=0.2"], "did you mean 'sparsity.target'"),
        (["--sweep", "README.md"], "README.md is not valid YAML (line"),
        (["--sweep", "pipeline/recipes/paper.yaml"], "must be a YAML list of settings"),
        (
            ["--cluster", "slurm/clusters/example.env", "model.path=llama-3.1-70b"],
            "no plan for 2 x 8 GPUs (--gpu h100 --gpu-memory 8GB)",
        ),
    ],
)
def test_mistakes_are_told_and_nothing_is_submitted(files, arguments, complaint):
    done = submit(*files, "--dry-run", *arguments, GPU_MEMORY="8GB")
    assert done.returncode != 0
    assert complaint in done.stderr
    assert "sbatch" not in done.stdout
