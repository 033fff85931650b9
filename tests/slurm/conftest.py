"""A cluster for the session, and runs of a tiny model on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster, missing_programs, wait_for
from tiny import SENTENCES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster():
    """Two nodes; without the packages the tests fail in CI and are skipped elsewhere."""
    missing = missing_programs()
    if missing:
        reason = f"no SLURM cluster can be started here: {', '.join(missing)} missing (.ci/run installs the packages)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = Cluster(nodes=2)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


CLUSTER_FILE = f"""\
PYTHON={sys.executable}
SBATCH_FLAGS=()
PRUNE_NODES=${{PRUNE_NODES:-2}}
PRUNE_GPUS=0
PRUNE_TIME=${{PRUNE_TIME:-5}}
PREPARE_TIME=5 FINETUNE_TIME=5 EXPORT_TIME=5 EVALUATE_TIME=5
SIGNAL_SECONDS=${{SIGNAL_SECONDS:-1}}
CONTAINER=(env IN_CONTAINER=1)
"""


class TinyRun:
    """A run of the tiny model: its files below `top`, and `submit.sh` for it.

    Args:
        cluster: where its jobs go.
        top: directory for its configuration and its run directory.
        settings: the configuration.
    """

    def __init__(self, cluster: Cluster, top: Path, settings: dict):
        self.cluster, self.top, self.run_dir = cluster, top, top / "run"
        self.config, self.cluster_file = top / "run.yaml", top / "tiny.env"
        self.config.write_text(yaml.safe_dump(settings | {"run_dir": str(self.run_dir)}))
        self.cluster_file.write_text(CLUSTER_FILE)

    def submit(self, *arguments: str, **variables: str) -> dict[str, str]:
        """Submit what is missing; returns the job of each stage that was submitted now."""
        printed = self.submit_text(*arguments, **variables)
        return dict(line.split(": job ") for line in self._first_words(printed))

    def submit_text(self, *arguments: str, **variables: str) -> str:
        """What submit.sh prints."""
        command = ["slurm/submit.sh", "--config", self.config, "--cluster", self.cluster_file, *arguments]
        environment = {**self.cluster.env, **variables, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self) -> dict:
        """`nuteprune status --json` on the cluster."""
        return json.loads(self.cluster.run(sys.executable, "-m", "nuteprune", "status", "--json", str(self.run_dir)))

    def log(self, stage: str) -> str:
        """Everything that was logged of a stage."""
        files = [f for f in sorted(self.top.rglob("logs/**/*")) if f.is_file() and stage in str(f)]
        return "\n".join(f"--- {f}\n{f.read_text(errors='replace')}" for f in files)

    def everything(self) -> str:
        """All logs of the run."""
        return self.log("")

    @staticmethod
    def _first_words(printed: str) -> list[str]:
        lines = [line for line in printed.splitlines() if ": job " in line and "already" not in line]
        return [line.split(" after ")[0] for line in lines]


@pytest.fixture(scope="session")
def undisturbed(cluster, model_dir, text_file, tmp_path_factory):
    """A run of the whole chain under torchrun that nothing interrupts, and its jobs, which have ended."""
    top = tmp_path_factory.mktemp("undisturbed")
    records = top / "records.json"
    records.write_text(json.dumps([{"prompt": s, "completion": s} for s in SENTENCES[:20]]))
    settings = tiny_settings(model_dir, text_file)
    settings["finetune"] = {"data": str(records), "seq_len": 128, "steps": 4, "batch_size": 4}
    settings["export"] = {"source": "pruned"}  # to be compared with runs that are not fine-tuned
    settings["distill"] = {"steps": 10}
    run = TinyRun(cluster, top, settings)
    jobs = run.submit(LAUNCHER="torchrun")
    cluster.wait_job(jobs["evaluate"], limit=900)
    return run, jobs


@pytest.fixture
def tiny_run(cluster, model_dir, text_file, tmp_path):
    """Makes runs of the tiny model: `tiny_run(steps=…)`."""

    def make(**train) -> TinyRun:
        return TinyRun(cluster, tmp_path, tiny_settings(model_dir, text_file, **train))

    yield make
    cluster.run("scancel", "--full", "--user=root")
    wait_for(lambda: not cluster.run("squeue", "-h"), 60, lambda: cluster.run("squeue"))


def tiny_settings(model_dir, text_file, **train) -> dict:
    """Settings of a short run of the whole chain."""
    return {
        "model": {"path": str(model_dir)},
        "deepspeed": "zero3",
        "data": {"source": str(text_file), "seq_len": 32},
        "train": {"steps": 60, "batch_size": 4, **train},
        "gates": {"importance_tokens": 256, "ffn_multiple": 1, "hidden_multiple": 1},
        "checkpoint": {"every": 10},
        "tracking": {"report_to": [], "progress": False},
        "evaluate": {"batch_sizes": [], "blocks": 2, "window": 32, "prompts": 0},
    }
