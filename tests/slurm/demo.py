"""`make demo-slurm`: prepare, prune, export and evaluate the real SmolLM2-135M as jobs of a real SLURM cluster.

The cluster has two nodes, both on this machine; each of the two ranks of pruning holds half of the base model (ZeRO-3).
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from slurm_cluster import Cluster, missing_programs

RUN = "runs/demo-slurm"
SETTINGS = [
    f"run_dir={RUN}", "deepspeed=zero3", "data.seq_len=128", "train.steps=20", "checkpoint.every=5",
    "gates.importance_tokens=1024", "evaluate.batch_sizes=[]", "evaluate.blocks=4", "tracking.progress=false",
]  # fmt: skip
CLUSTER_FILE = f"""\
PYTHON={sys.executable}
PRUNE_NODES=2 PRUNE_GPUS=0
PREPARE_TIME=30 PRUNE_TIME=60 EXPORT_TIME=30 EVALUATE_TIME=30
export OMP_NUM_THREADS=1
"""


def main() -> int:
    """Run the chain to its end; returns the exit code."""
    if missing := missing_programs():
        sys.stderr.write(f"demo-slurm: {', '.join(missing)} missing here; .ci/run shows the packages\n")
        return 2
    status = [sys.executable, "-m", "nuteprune", "status", RUN]
    cluster = Cluster(nodes=2)
    try:
        cluster.start()
        cluster_file = cluster.top / "demo.env"
        cluster_file.write_text(CLUSTER_FILE)
        command = ["slurm/submit.sh", "--config", "pipeline/recipes/demo.yaml", "--cluster", cluster_file, *SETTINGS]
        subprocess.run(command, env=cluster.env, check=True)
        print(f"from another terminal: SLURM_CONF={cluster.env['SLURM_CONF']} squeue", flush=True)
        began, shown = time.monotonic(), ""
        while cluster.run("squeue", "-h"):
            jobs = cluster.run("squeue", "-h", "--sort=i", "-o", "%j: %T %N %r")
            if jobs != shown:
                print(f"--- {time.monotonic() - began:.0f} s\n{jobs}", end="", flush=True)
                shown = jobs
            time.sleep(2)
        print(cluster.run(*status))
    finally:
        cluster.stop()
    report = Path(RUN) / "evaluate" / "report.md"
    if not report.is_file():
        return 1
    print(report.read_text())
    return 0


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    sys.exit(main())
