"""The wheel alone, in a fresh environment and a directory that is no checkout, does what README and slurm/README show.

The environment borrows the installed dependencies, but neither this checkout nor Hugging Face's package `kernels`.
"""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("wheel")

ROOT = Path(__file__).parents[2]
REST = """
import sys, nuteprune, nuteprune.kernels.triton_kernels
nuteprune.export(sys.argv[1])
nuteprune.evaluate(sys.argv[1], sys.argv[2:])
"""
STRAY = "raise ImportError('a stray module of the user, not to be imported')\n"


def run(*command) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what git tracks, so that nothing left in the checkout gets into it."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                target.symlink_to(os.readlink(ROOT / name))
            else:
                target.write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, source)
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def binaries(wheel, tmp_path_factory) -> Path:
    """The `bin` of a fresh environment with the wheel in it."""
    place = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(place, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        ours = entry.name.startswith(("nuteprune", "__editable__", "kernels", "_virtualenv", "distutils-precedence"))
        if not ours and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0].split("-")[0] for name in archive.namelist()} == {"nuteprune"}
    run(sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "--quiet", "--no-deps", wheel)
    return place / "bin"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty directory but for two modules of a user's own, as the current one."""
    for name in ("pipeline.py", "kernels.py"):
        (tmp_path / name).write_text(STRAY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_wheel_asks_for_no_triton(wheel):
    """PyPI's would overwrite the one that torch for ROCm brings, which has the same folder under another name."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    wanted = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert any("torch" in line for line in wanted)
    assert not any("triton" in line for line in wanted)


def test_a_run_from_the_wheel_alone(binaries, elsewhere, settings, text_file):
    """Ranks, a DeepSpeed file, recipes, tasks, the kernels' names: prune → export → evaluate."""
    launcher = [binaries / "python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    run(*launcher, "-m", "nuteprune", "prune", *settings, "train.steps=6", "deepspeed=zero3", "gates.settle=0.5")
    made = elsewhere / "run"
    wanted = {"tasks": "[local_mc]", "task_limit": 2, "window": 64, "blocks": 2, "text": text_file, "batch_sizes": "[]"}
    run(binaries / "python", "-I", "-c", REST, made, *(f"evaluate.{key}={value}" for key, value in wanted.items()))
    assert "local_mc" in (made / "evaluate" / "report.md").read_text()


def test_what_the_manual_shows_needs_no_checkout(binaries, elsewhere):
    """The cluster file and a chain of jobs (with the planner's figures: tests/slurm/test_submit.py)."""
    example = run(binaries / "nuteprune", "submit", "--example")
    (elsewhere / "my.env").write_text(f"{example}\nPRUNE_GPUS=0 PRUNE_TIME=10\n")
    jobs = run(
        binaries / "nuteprune", "submit", "--cluster", "my.env", "--dry-run", "recipe=llama2-13b", "run_dir=runs/x"
    )
    assert [line.split("--job-name=x-")[1].split()[0] for line in jobs.splitlines()] == [
        "prepare", "prune", "export", "evaluate"
    ]  # fmt: skip
    scripts = {word for line in jobs.splitlines() for word in line.split() if word.endswith("stage.sbatch")}
    assert all(Path(script).is_file() and not Path(script).is_relative_to(ROOT) for script in scripts)
