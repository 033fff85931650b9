"""Which tile sizes to launch: a short list, measured once per card and shape bucket, remembered on disk."""

import fcntl
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

MEASURE = True
"""Whether tile sizes are chosen by measuring them; other sizes may round otherwise (`train.deterministic`)."""
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class TileConfig(NamedTuple):
    """Tile of the matmul [bm, bn] in steps of bk, pipeline stages and warps."""

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int


# Every entry compiles for the cards it is offered to without spilling a register, at rank 16 with gates and bias, and
# fits the 163 KiB of shared memory of an A100; tests/kernels/test_kernels_compile.py holds that.
DENSE_16BIT = (
    TileConfig(128, 128, 64, 3, 8),  # the safe middle: two programs a multiprocessor, divides all the models' sizes
    TileConfig(64, 128, 64, 4, 4),  # few tokens or few kept units: more programs, so that no multiprocessor idles
)
# Most reuse per byte: long batches and wide layers. wgmma reads operands from shared memory; on sm_80 this one spills.
HOPPER_16BIT = (TileConfig(128, 256, 64, 3, 8),)
# Gathered tiles hold one offset per element in registers: half the depth.
SCATTERED_16BIT = (TileConfig(128, 128, 32, 3, 8), TileConfig(64, 128, 32, 3, 4))
# Other cards: half the buffers, for the 64 KiB of shared memory of an AMD MI300, which the lists above exceed.
OTHER_16BIT = (TileConfig(128, 128, 64, 2, 8), TileConfig(64, 128, 64, 2, 4))
# fp32 runs as three TF32 products: twice the bytes and more registers, hence half the tile; the taller for many tokens.
DENSE_32BIT = (TileConfig(64, 64, 32, 3, 8), TileConfig(128, 64, 32, 3, 8))
SCATTERED_32BIT = (TileConfig(64, 32, 16, 3, 4), TileConfig(64, 64, 16, 3, 8))
INTERPRETER = TileConfig(32, 32, 32, 1, 4)  # small, so that the odd shapes of the tests cross tile borders


def skinny(rank: int, dtype: torch.dtype) -> TileConfig:
    """For xAᵀ alone: few columns, so short tiles (the rows are all there is to spread over the card)."""
    bn = min(rank, 64)
    return TileConfig(32, bn, 32, 2, 8) if dtype == torch.float32 else TileConfig(32, bn, 64, 2, 4)


def reduction(dtype: torch.dtype) -> TileConfig:
    """For the column reduction, bm rows a step and bn columns: bound by memory, so one size will do."""
    return TileConfig(32, 64, 0, 3, 8) if dtype == torch.float32 else TileConfig(64, 64, 0, 3, 4)


def options(dtype: torch.dtype, scattered: bool, capability: int) -> tuple[TileConfig, ...]:
    """The tile sizes to choose from on an NVIDIA card of compute capability 80, 90, … (0: any other card)."""
    if dtype == torch.float32:
        return SCATTERED_32BIT if scattered else DENSE_32BIT
    if scattered:
        return SCATTERED_16BIT
    if capability < 80:
        return OTHER_16BIT
    return DENSE_16BIT + HOPPER_16BIT if capability == 90 else DENSE_16BIT


def configs(dtype: torch.dtype, scattered: bool, device: torch.device) -> tuple[TileConfig, ...]:
    """The tile sizes to choose from on `device`."""
    nvidia = device.type == "cuda" and not torch.version.hip
    major, minor = torch.cuda.get_device_capability(device) if nvidia else (0, 0)
    return options(dtype, scattered, 10 * major + minor)


def bucket(tokens: int) -> int:
    """Token counts that share a choice: the next power of two, at least 16."""
    return max(16, 1 << max(tokens - 1, 0).bit_length())


def cache_path(card: str) -> Path:
    """NUTEPRUNE_CACHE (default ~/.cache/nuteprune) / kernels-<card>.json."""
    root = Path(os.environ.get("NUTEPRUNE_CACHE") or Path.home() / ".cache" / "nuteprune")
    return root / f"kernels-{re.sub(r'[^A-Za-z0-9]+', '-', card)}.json"


class Tuner:
    """Remembers the fastest config per key for one card, in memory and in a JSON file."""

    def __init__(self, card: str):
        self.path = cache_path(card)
        self.chosen: dict[str, TileConfig] = self._read()

    def _read(self) -> dict[str, TileConfig]:
        try:
            return {key: TileConfig(*value) for key, value in json.loads(self.path.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}  # nothing measured yet, or not a file of ours: measure again

    def _write(self) -> None:
        """Keep what other processes measured meanwhile; replace atomically. A read-only home costs only the memory."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                merged = {**self._read(), **self.chosen}
                scratch = self.path.with_suffix(f".{os.getpid()}")
                scratch.write_text(json.dumps({key: list(value) for key, value in merged.items()}, indent=0))
                scratch.replace(self.path)
        except OSError:
            return

    def pick(self, key: str, choices: Sequence[TileConfig], measure: Callable[[TileConfig], float]) -> TileConfig:
        """The remembered config of `key` if it is still an option, else the one with the smallest `measure` (ms).

        Where every measure is infinite, the first, which is not remembered.
        """
        if self.chosen.get(key) not in choices:
            times = [measure(config) for config in choices]
            if min(times) == math.inf:
                return choices[0]
            self.chosen[key] = choices[times.index(min(times))]
            self._write()
        return self.chosen[key]


def milliseconds(launch: Callable[[TileConfig], None], config: TileConfig) -> float:
    """Time of a launch; infinity where the card has less shared memory or fewer registers than it needs."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        launch(config)
        return do_bench(lambda: launch(config), warmup=5, rep=20)
    except OutOfResources:
        return math.inf


@lru_cache
def tuner_of(card: str) -> Tuner:
    return Tuner(card)


def choose(
    key: str, choices: Sequence[TileConfig], device: torch.device, launch: Callable[[TileConfig], None]
) -> TileConfig:
    """The config for a launch on `device`; measures on first use, except when interpreting or capturing a graph."""
    if INTERPRETING:
        return INTERPRETER
    if not MEASURE:
        return choices[0]
    tuner = tuner_of(torch.cuda.get_device_name(device))
    if key not in tuner.chosen and torch.cuda.is_current_stream_capturing():
        return choices[0]
    return tuner.pick(key, choices, partial(milliseconds, launch))
