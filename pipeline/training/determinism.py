"""What makes a GPU compute the same bits each time; where that holds without it is in docs/determinism.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let a GPU compute the same bits each time (`train.deterministic`); on a CPU it does so anyway.

    torch takes deterministic algorithms, its flash attention without atomics among them, and raises where there is
    none; cuBLAS gets a workspace of its own for each stream; flash-attn is told through transformers; the kernels' tile
    sizes are fixed instead of measured. Environment variables stay, as cuBLAS reads its once.
    """
    if not wanted:
        yield
        return
    from nuteprune.kernels import tuning  # reads TRITON_INTERPRET when it is imported: not before it is needed

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    measured, tuning.MEASURE = tuning.MEASURE, False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help for debugging that costs a pass over memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
        tuning.MEASURE = measured
