"""Which tile sizes to launch: a short list, measured once per card and shape bucket, remembered on disk."""

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class Config(NamedTuple):
    """Tile of the matmul [bm, bn] in steps of bk, pipeline stages and warps."""

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int


# Every entry fits the 163 KiB of shared memory of an A100 (and so the 227 KiB of an H100) at rank 16.
CONFIGS_16BIT = (
    Config(
        128, 128, 64, 3, 8
    ),  # the safe middle: two programs a multiprocessor on H100, all models' sizes are multiples
    Config(128, 256, 64, 3, 8),  # most reuse per byte of shared memory: long batches and wide layers
    Config(64, 128, 64, 4, 4),  # few tokens or few kept units: more programs, so that no multiprocessor idles
)
# fp32 runs as three TF32 products: twice the bytes and more registers, hence half the tile.
CONFIGS_32BIT = (
    Config(64, 64, 32, 3, 4),
    Config(128, 64, 32, 3, 8),  # many tokens: W's tile is used by twice the rows
)
INTERPRETER = Config(32, 32, 32, 1, 4)  # small, so that the odd shapes of the tests cross tile borders
REDUCE = Config(64, 64, 0, 3, 4)  # bm rows a step, bn columns: bound by memory, so one size will do


def configs(dtype: torch.dtype) -> Sequence[Config]:
    """The tile sizes to choose from for operands of `dtype`."""
    return CONFIGS_32BIT if dtype == torch.float32 else CONFIGS_16BIT


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
        self.chosen: dict[str, Config] = self._read()

    def _read(self) -> dict[str, Config]:
        try:
            return {key: Config(*value) for key, value in json.loads(self.path.read_text()).items()}
        except (FileNotFoundError, json.JSONDecodeError, TypeError):
            return {}  # nothing measured yet, or a file of another version: measure again

    def _write(self) -> None:
        """Keep what other processes measured meanwhile; replace atomically. A read-only home costs only the memory."""
        merged = {**self._read(), **self.chosen}
        scratch = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps({key: list(value) for key, value in merged.items()}, indent=0))
            scratch.replace(self.path)
        except OSError:
            return

    def pick(self, key: str, options: Sequence[Config], measure: Callable[[Config], float]) -> Config:
        """The remembered config of `key` if it is still an option, else the one with the smallest `measure` (ms)."""
        if self.chosen.get(key) not in options:
            self.chosen[key] = min(options, key=measure)
            self._write()
        return self.chosen[key]


@lru_cache
def tuner_of(card: str) -> Tuner:
    return Tuner(card)


def choose(key: str, dtype: torch.dtype, device: torch.device, launch: Callable[[Config], None]) -> Config:
    """The config for a launch on `device`; measures on first use, except when interpreting or capturing a graph."""
    if INTERPRETING:
        return INTERPRETER
    options, tuner = configs(dtype), tuner_of(torch.cuda.get_device_name(device))
    if key not in tuner.chosen and torch.cuda.is_current_stream_capturing():
        return options[0]
    from triton.testing import do_bench

    return tuner.pick(key, options, lambda config: do_bench(lambda: launch(config), warmup=5, rep=20))
