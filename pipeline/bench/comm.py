"""Bytes of weights that ZeRO-3 gathers in a step: `make bench-comm`, or torchrun … -m nuteprune.bench.comm.

Counted at DeepSpeed's calls of all-gather, after the first step, with its sizes as a run has them (smaller than the
model, so that nothing stays gathered between uses). Paired is the step of a run: teacher and student in one forward.
Separate is what it replaces: a forward of the teacher, then one of the student, then backward.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from nuteprune.__main__ import quiet_libraries
from nuteprune.config import Config, load_config
from nuteprune.model.layers import View, build_view
from nuteprune.model.loading import Base, read_base
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.distributed import World, connected, discover
from nuteprune.parallel.sizes import total_parameters
from nuteprune.parallel.zero import load_paired, zero_settings
from nuteprune.planning.costs import traffic
from nuteprune.planning.job import Cluster, Job, Layout


class GatheredBytes:
    """Counts the bytes that gathers deliver to this rank, by the number of ranks that take part, and of the largest."""

    def __init__(self):
        self.by_ranks: dict[int, int] = {}
        self.largest = 0

    @property
    def total(self) -> int:
        return sum(self.by_ranks.values())

    @contextmanager
    def counting(self) -> Iterator[GatheredBytes]:
        """Count DeepSpeed's gathers inside the block."""
        from deepspeed.comm import comm

        backend = comm.cdb
        original = backend.all_gather_into_tensor

        def counted(output_tensor, input_tensor, *args, **kwargs):
            ranks = output_tensor.numel() // input_tensor.numel()
            self.by_ranks[ranks] = self.by_ranks.get(ranks, 0) + output_tensor.nbytes
            self.largest = max(self.largest, output_tensor.nbytes)
            return original(output_tensor, input_tensor, *args, **kwargs)

        backend.all_gather_into_tensor = counted
        try:
            yield self
        finally:
            backend.all_gather_into_tensor = original


def partitioned_run(model: str, tokens: int, world: World) -> tuple[Config, Base]:
    """Settings of a run under ZeRO-3 with one sequence of `tokens` a rank, and the model."""
    config = load_config(None, [f"model.path={model}", f"train.batch_size={world.size}", "deepspeed=zero3",
                                f"data.seq_len={tokens}"])  # fmt: skip
    return config, read_base(config.model)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="measured steps, after one to warm up")
    args = parser.parse_args(argv)
    quiet_libraries()
    world = discover()
    config, base = partitioned_run(args.model, args.tokens, world)
    spec = base.spec
    with connected(world, config.train.rank_timeout):
        model = load_paired(base, config.lora, world, zero_settings(config, spec, world))
        generator = torch.Generator().manual_seed(world.rank)
        ids = torch.randint(0, spec.vocab, (1, args.tokens), generator=generator).to(world.device)
        job = Job(spec, config, Cluster(1, world.size))
        size = total_parameters(spec) * job.itemsize
        for mode, step in (("paired", paired), ("separate", separate)):
            gathered = count(partial(step, model, ids, config.loss), args.steps)
            measured = gathered.total / args.steps / size
            planned = traffic(job, Layout(3, 1), mode).ratio
            if world.is_main:
                sys.stdout.write(f"{mode} {measured:.2f} x base bytes per step (the planner says {planned:.2f})\n")
    return 0


def count(step: Callable[[], None], steps: int) -> GatheredBytes:
    """What several steps gather, after a first one."""
    step()
    with GatheredBytes().counting() as gathered:
        for _ in range(steps):
            step()
    return gathered


def paired(model: PairedModel, ids: torch.Tensor, loss) -> None:
    """Teacher and student in one pass."""
    model(ids, _student(model), _teacher(model), loss).total.backward()


def separate(model: PairedModel, ids: torch.Tensor, loss) -> None:
    """The teacher's pass, then the student's."""
    with torch.no_grad():
        model(ids, _teacher(model), None, loss)
    model(ids, _student(model), None, loss).total.backward()


def _student(model: PairedModel) -> View:
    return model.student(None)


def _teacher(model: PairedModel) -> View:
    return build_view(model.spec, None, {}, model.scaling, model.dtype)


if __name__ == "__main__":
    sys.exit(main())
