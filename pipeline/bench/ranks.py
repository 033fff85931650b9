"""The same run on one process and on several ranks, on a real model: `make bench-ranks`.

Runs `prune` on one process, and on two and four ranks under several DeepSpeed files, with micro-batches of one sequence
so that all draw the same gates; prints how far the losses are apart, and whether the units kept are the same. One
process with two threads shows what rounding alone does.

Steps are as small as in a run of 300. Those of a run of 30 make any rounding grow beyond comparison, on one process as
well: `make bench-ranks BENCH_ARGS="gates.lr=2.5 train.lora_lr=3e-3"` shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from nuteprune.runs.rundir import load_run

WORLDS = [
    (1, "", 1),
    *((ranks, settings, 1) for ranks in (2, 4) for settings in ("zero2", "zero3", "zero3_offload")),
    (1, "", 2),
    (2, "zero3_nvme", 1),  # last: it needs libaio-dev
]
"""Ranks, DeepSpeed file, threads of each rank."""


def main(argv: list[str] | None = None) -> int:
    """Run and print; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--text", default="models/demo-text/train.txt")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/ranks"))
    parser.add_argument("settings", nargs="*", help="settings of the run, as for prune")
    args = parser.parse_args(argv)
    settings = [
        f"model.path={args.model}", f"data.source={args.text}", "data.documents=0", f"data.seq_len={args.tokens}",
        f"train.steps={args.steps}", "train.batch_size=4", "train.micro_batch=1", "gates.importance_tokens=512",
        "gates.lr=0.25", "train.lora_lr=3e-4", "tracking.progress=false", "tracking.report_to=[]",
        "checkpoint.every=0", *args.settings,
    ]  # fmt: skip
    reference = None
    for ranks, deepspeed, threads in WORLDS:
        run_dir = args.out / f"{ranks}-{deepspeed or 'plain'}-{threads}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        own = [f"run_dir={run_dir}", f"deepspeed={deepspeed}"]
        command = [*launcher, "-m", "nuteprune", "prune", *settings, *own]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        curve, gates = losses(run_dir), load_run(run_dir).gates.as_dict()
        reference = reference or (curve, gates)
        apart = max(abs(a - b) / abs(b) for a, b in zip(curve, reference[0], strict=True))
        other = sum(int((gates[kind] != reference[1][kind]).sum()) for kind in gates)
        units = sum(g.numel() for g in gates.values())
        sys.stdout.write(f"{ranks} ranks, {deepspeed or 'no deepspeed'}, {threads} threads each: losses within "
                         f"{apart:.1e} of one process, {other} of {units} units decided otherwise\n")  # fmt: skip
        sys.stdout.flush()
    return 0


def losses(run_dir: Path) -> list[float]:
    """The loss of every step of a run."""
    return [json.loads(line)["prune/loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
