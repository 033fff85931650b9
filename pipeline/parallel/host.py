"""This machine: its processor, and the memory that a process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


def processor() -> dict[str, str]:
    """Facts of the processor by their names in /proc/cpuinfo; none where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def multiplies_bfloat16() -> bool | None:
    """Whether the processor multiplies bfloat16, None where it does not say: x86 alone does."""
    flags = processor().get("flags")
    return None if flags is None else not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())


def free_memory() -> int:
    """Bytes of host memory that are free: of the machine, or of what a batch system or a container grants."""
    return min([psutil.virtual_memory().available, *_granted()])


def _granted() -> list[int]:
    """What is left below the limit of each control group that this process is in (version 2)."""
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition("::/")[2]
    except OSError:  # not Linux
        return []
    found = []
    for group in (_CGROUPS / own, *(_CGROUPS / own).parents):
        try:
            limit, used = ((group / f"memory.{name}").read_text(encoding="utf-8") for name in ("max", "current"))
            facts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        except OSError:
            continue
        if limit.strip() != "max":
            found.append(int(limit) - int(used) + int(facts.get("inactive_file", 0)))  # the cache of files gives way
    return found
