"""The device that a process computes on, and a GPU of the machine that torch does not see."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

from nuteprune.errors import UserError

HIDDEN = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Variables with which a user, or SLURM, hides all GPUs: empty, -1 or NoDevFiles."""
ASK_NVIDIA = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
KFD, TOPOLOGY = Path("/dev/kfd"), Path("/sys/class/kfd/kfd/topology/nodes")
"""The device through which ROCm computes, and what the kernel says of the cards behind it."""
OWN_MEMORY = 6e9
"""Bytes of its own memory that make an AMD GPU one to compute on; the share of a laptop's is smaller."""


def check_gpu() -> None:
    """Raise `UserError` where the machine has a GPU and torch none: on its CPU a run would take days for hours."""
    if found := unseen_gpu():
        raise UserError(
            f"this machine has a GPU ({found}), but {build()} does not see it: install a torch that fits its driver "
            "(pytorch.org/get-started/locally), or set CUDA_VISIBLE_DEVICES= (empty) to compute on the CPU"
        )


def unseen_gpu() -> str:
    """What shows that this machine has a GPU although torch sees none; empty where nothing does, or it is hidden."""
    hidden = any(os.environ.get(name, "0").strip() in ("", "-1", "NoDevFiles") for name in HIDDEN)
    if hidden or torch.cuda.is_available():
        return ""
    return _nvidia() or _amd() or _slurm()


def build() -> str:
    """torch's version, and what it was built for."""
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return f"torch {torch.__version__}, built for {kind if torch.version.cuda or torch.version.hip else 'the CPU'},"


def named(device: torch.device) -> str:
    """A device and its torch, for a log."""
    card = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "the CPU"
    return f"{card}, {build().rstrip(',')}"


def _nvidia() -> str:
    try:
        done = subprocess.run(ASK_NVIDIA, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return ""
    name, _, driver = lines[0].partition(", ")
    return f"{name}, driver {driver}"


def _amd() -> str:
    for node in sorted(TOPOLOGY.glob("*")) if os.access(KFD, os.R_OK | os.W_OK) else ():
        banks = [dict(line.split(" ", 1) for line in text.splitlines() if " " in line) for text in _texts(node)]
        # Heaps 1 and 2 are the card's own memory.
        if sum(int(b.get("size_in_bytes", 0)) for b in banks if b.get("heap_type") in ("1", "2")) > OWN_MEMORY:
            return "an AMD card, /dev/kfd"
    return ""


def _texts(node: Path) -> list[str]:
    try:
        return [path.read_text() for path in node.glob("mem_banks/*/properties")]
    except OSError:
        return []


def _slurm() -> str:
    count = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    return "" if count in ("", "0") else f"SLURM_GPUS_ON_NODE={count}"
