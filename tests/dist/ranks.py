"""Several ranks of the command line on this machine, started from a server that has imported everything once.

A rank is forked, gets the variables that torchrun would set, and runs `pipeline.__main__.cli`. A group that does not
end in time is killed, each process by its id.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HANG = 240
"""Seconds after which a group counts as hung: a group takes a few, many times that on a machine full of other work."""


@dataclass
class Ended:
    """What a rank left: its exit code (negative: the signal that ended it) and its output."""

    code: int
    text: str


class Group:
    """Ranks that run together.

    Args:
        arguments: the command line of every rank, or one for each.
        size: number of ranks.
        logs: directory of their output.
        hook: a function that each rank calls before it starts, given its number.
        program: what each rank runs, the command line if None.
    """

    def __init__(self, arguments: list, size: int, logs: Path, hook=None, program=None):
        context = _context()
        logs.mkdir(parents=True, exist_ok=True)
        port = free_port()
        each = arguments if arguments and isinstance(arguments[0], list) else [arguments] * size
        self.logs = [logs / f"rank-{rank}.log" for rank in range(size)]
        self.processes = [
            context.Process(target=_run, args=(each[rank], rank, size, port, str(self.logs[rank]), hook, program))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def wait(self, timeout: float = HANG) -> list[Ended]:
        """Every rank's end."""
        until = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.join(max(0.1, until - time.monotonic()))
            alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
            texts = [log.read_text(errors="replace") for log in self.logs]
            assert not alive, f"ranks {alive} hang\n" + "\n".join(texts)
            return [Ended(p.exitcode, text) for p, text in zip(self.processes, texts, strict=True)]
        finally:
            for process in self.processes:
                process.kill()
                process.join()


def run(arguments: list, size: int, logs: Path, hook=None, program=None) -> list[Ended]:
    """Run a group to its end; every rank must succeed."""
    ended = Group(arguments, size, logs, hook, program).wait()
    assert [e.code for e in ended] == [0] * size, "\n".join(e.text for e in ended)
    return ended


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _context():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    stages = [f"nuteprune.stages.{name}" for name in ("prune", "recover", "finetune", "distill")]
    later = ["nuteprune.data.text", "nuteprune.training.pictures", "peft"]
    context.set_forkserver_preload([*stages, *later, "nuteprune.__main__", "deepspeed"])
    return context


def _run(arguments, rank, size, port, log, hook, program):
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    if hook is not None:
        hook(rank)
    from nuteprune.__main__ import cli

    sys.argv[1:] = arguments
    (program or cli)()
