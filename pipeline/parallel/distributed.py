"""Who and where this process is: rank, world size and device; how its launcher is recognised; what ranks agree on."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nuteprune.errors import UserError, first_line
from nuteprune.parallel.device import check_gpu

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""What Open MPI and MPICH tell a process before MPI_Init."""


PAUSE = 2.0
"""Seconds between two meetings of ranks that wait for one of them, see `World.unhurried`."""


class RankLost(RuntimeError):
    """Another rank died or hangs; this one cannot go on."""

    exit_code = 75
    """As of `signals.Preempted`: the same command goes on from the newest checkpoint."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run.

    Attributes:
        rank, size: this process's number, and how many there are.
        local_rank, local_size: the same on its node; of a rank that sees a card of its own alone `local_rank` is 0.
        device: where it computes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of a tensor on `device`, in place; the same bits on every rank."""
        return self.sum(values).div_(self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor on `device`, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_at(self, values: Tensor, rank: int) -> bool:
        """Sum a tensor on `device` over the ranks, in place at one of them; returns whether this is that one."""
        if self.size > 1:
            dist.reduce(values, rank)
        return self.rank == rank

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def gather(self, value: Any) -> list:
        """A picklable value of every rank, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's picklable value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def unhurried(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on this rank, after it has ended on all of them, however long that takes; collective.

        It runs beside the ranks' meetings, so that no meeting is waited for longer than `PAUSE`; it must not
        communicate. A `UserError` on any rank is raised on all.
        """
        future: Future = Future()
        if self.size == 1:
            return work()

        def run() -> None:
            if self.device.type == "cuda":  # each thread has a device of its own
                torch.cuda.set_device(self.device)
            try:
                future.set_result(work())
            except Exception as error:  # whatever it is: raised below, by the thread that waits
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()  # which a signal need not wait for
        while self.any(not future.done()):
            wait([future], PAUSE)
        with self.together():
            return future.result()

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block after which all ranks go on or none: a `UserError` on any of them is raised on all.

        Nothing in the block may communicate, since a rank that fails leaves it early.
        """
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        found = self.gather(None if error is None else (type(error), str(error)))
        failed = [rank for rank, fault in enumerate(found) if fault is not None]
        if failed:
            kind, message = found[failed[0]]
            where = f"rank {failed[0]}: " if 0 < len(failed) < self.size else ""
            raise kind(where + message) from error


def discover(computes: bool = True) -> World:
    """This process's place, from its launcher: torchrun or deepspeed, a step of srun, mpirun, or none of them.

    torch and DeepSpeed read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT: every launcher gets them set.

    Args:
        computes: False for what needs no GPU: none is opened, which would take half a gigabyte of its memory.

    Raises:
        UserError: the launcher's variables contradict each other; or there is a GPU that torch does not see.
    """
    # Shapes change with every sample of the gates: without it freed blocks fit no new one, and memory runs out early.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    place = _from_torchrun() or _from_slurm() or _from_mpi()
    rank, size, local_rank, local_size = place or (0, 1, 0, 1)
    if computes:
        check_gpu()
    if computes and torch.cuda.is_available():
        # A launcher may show each rank all GPUs of its node, or its own only.
        local_rank %= torch.cuda.device_count()
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory(True)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local_size),
    }  # fmt: skip
    return World(rank, size, local_rank, local_size, device)


@contextmanager
def connected(world: World, timeout: int) -> Iterator[None]:
    """The process group of a run, from its start to its end; a world of one gets one too, for DeepSpeed.

    Args:
        world: this process's place.
        timeout: seconds that a rank waits for the others before it gives up.

    Raises:
        UserError: two ranks are on one GPU.
        RankLost: another rank died or did not answer in time.
    """
    options: dict = {"timeout": timedelta(seconds=timeout)}
    if world.size == 1:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if world.device.type == "cuda":
        options["device_id"] = world.device
    finished = False
    try:
        dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo", **options)
        yield
        finished = True
    except RuntimeError as error:
        if shared := re.search("Duplicate GPU detected.*", str(error)):
            raise UserError(f"NCCL: {shared[0]}: start one rank for each GPU that torch sees on its node") from None
        if not _is_about_peers(error):
            raise
        raise RankLost(
            f"rank {world.rank} of {world.size} lost another rank ({first_line(error, 150)}): see "
            "the other ranks' messages; start again to go on from the newest checkpoint"
        ) from error
    finally:
        # Not after a failure among several ranks: a group whose other ranks are gone can wait for them for ever.
        if finished or world.size == 1:
            dist.destroy_process_group()


def _is_about_peers(error: RuntimeError) -> bool:
    """Whether a communication call failed: NCCL and the store raise a type of their own, gloo a message."""
    return isinstance(error, dist.DistError) or re.search(r"gloo|Connection (closed|reset)", str(error)) is not None


Place = tuple[int, int, int, int]
"""Rank, world size, rank on the node, ranks of the node."""


def _from_torchrun() -> Place | None:
    """The place under torchrun and the deepspeed launcher (LOCAL_SIZE is its word for the ranks of a node)."""
    if (size := _number("WORLD_SIZE")) == 1:
        return None
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set but {', '.join(missing)} is not: start with torchrun or unset WORLD_SIZE")
    local_size = _number("LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE")
    return _number("RANK"), size, _number("LOCAL_RANK"), local_size


def _number(name: str) -> int:
    """A launcher's variable, 1 where it is not set; raises `UserError` for one that is no number."""
    text = os.environ.get(name) or "1"
    if not text.isdecimal():
        raise UserError(f"{name}={text} is not a number: start with torchrun, or unset {name}")
    return int(text)


def _from_slurm() -> Place | None:
    """The place under srun: only inside a step of several tasks, not in a batch script or a shell of an allocation.

    Nor under mpirun: its daemons on other nodes are a step, of one task a node, whose variables their ranks inherit.
    """
    size = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if size == 1 or "OMPI_COMM_WORLD_SIZE" in os.environ or int(os.environ.get("PMI_SIZE", size)) != size:
        return None
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000))
    # "2(x3),1": two tasks on each of three nodes, one on the last
    local_size = int(re.split(r"\D", os.environ["SLURM_STEP_TASKS_PER_NODE"], maxsplit=1)[0])
    return int(os.environ["SLURM_PROCID"]), size, int(os.environ["SLURM_LOCALID"]), local_size


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: "node[03-05,9],other" is node03."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None, nodes
    return "".join(match.groups(default=""))


def _from_mpi() -> Place | None:
    """The place under mpirun, found through mpi4py; rank 0 chooses the port."""
    if all(int(os.environ.get(name, "1")) == 1 for name in _MPI_SIZES):
        return None
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    if "MASTER_PORT" not in os.environ:
        host = "127.0.0.1" if node.size == world.size else socket.gethostname()
        with socket.socket() as probe:
            probe.bind(("", 0))
            address = world.bcast((host, str(probe.getsockname()[1])))
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address
    return world.rank, world.size, node.rank, node.size


def keep_freed_memory(keep: bool) -> None:
    """Tell glibc what to do with large buffers that are freed.

    A process keeps them: fetching them again costs a page fault every 4 KB, a fifth of a step's time on a CPU. Ranks
    that gather weights hand them back: the holes between gathered weights doubled their memory.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(parameter, 1 << 30 if keep else 1 << 17)


@contextmanager
def gathered(*weights: Tensor) -> Iterator[None]:
    """A block in which frozen weights are whole, which ZeRO-3 may have partitioned; collective then."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        yield
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # Those that are whole, as small ones stay, would be partitioned behind the block.
    parted = [weight for weight in weights if weight.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    with deepspeed.zero.GatheredParameters(parted):
        yield
