"""The short campaign: a dozen faults against pruning on one and two ranks and the export; `make chaos` is long."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
FAULTS = 12


def test_the_same_command_recovers_from_a_dozen_faults(tmp_path):
    paths = os.pathsep.join(map(str, (HERE.parent, HERE.parent / "dist")))
    done = subprocess.run(
        [sys.executable, HERE / "campaign.py", "--short", f"--faults={FAULTS}", f"--work={tmp_path}"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, cwd=HERE.parents[1], capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    trials = [json.loads(line) for line in (tmp_path / "results-0-1.jsonl").read_text().splitlines()]
    assert len(trials) == FAULTS
    assert len({trial["fault"] for trial in trials}) >= 6
    assert Counter(trial["verdict"] for trial in trials)["identical"] >= FAULTS // 2
    assert "| **all** | 12 |" in (tmp_path / "chaos.md").read_text()
