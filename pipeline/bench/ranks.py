"""The same run on one process and on several ranks, on a real model: `make bench-ranks`.

Runs `prune` on one process, on two ranks under several DeepSpeed files and on four under ZeRO-3, with micro-batches of
one sequence so that all draw the same gates; prints how far the losses are apart, and whether the units kept are the
same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from pipeline.rundir import load_run

WORLDS = ((1, ""), (2, "zero2"), (2, "zero3"), (2, "zero3_offload"), (4, "zero3"))


def main(argv: list[str] | None = None) -> int:
    """Run and print; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--text", default="models/demo-text/train.txt")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/ranks"))
    args = parser.parse_args(argv)
    settings = [
        f"model.path={args.model}", f"data.source={args.text}", "data.documents=0", f"data.seq_len={args.tokens}",
        f"train.steps={args.steps}", "train.batch_size=4", "train.micro_batch=1", "gates.importance_batches=2",
        "tracking.progress=false", "tracking.tensorboard=false", "checkpoint.every=0", "checkpoint.resume=never",
    ]  # fmt: skip
    reference = None
    for ranks, deepspeed in WORLDS:
        run_dir = args.out / f"{ranks}-{deepspeed or 'plain'}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        own = [f"run_dir={run_dir}", f"deepspeed={deepspeed}"]
        command = [*launcher, "-m", "pipeline", "prune", *settings, *own]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        curve, gates = losses(run_dir), load_run(run_dir).gates.as_dict()
        reference = reference or (curve, gates)
        apart = max(abs(a - b) / abs(b) for a, b in zip(curve, reference[0], strict=True))
        same = all(torch.equal(gates[kind], reference[1][kind]) for kind in reference[1])
        sys.stdout.write(f"{ranks} ranks, {deepspeed or 'no deepspeed'}: losses within {apart:.1e} of one process, "
                         f"{'the same' if same else 'OTHER'} units kept\n")  # fmt: skip
        sys.stdout.flush()
    return 0


def losses(run_dir: Path) -> list[float]:
    """The loss of every step of a run."""
    return [json.loads(line)["prune/loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
