"""Every kernel and every tile size that can be chosen compiles for A100, H100 and MI300, without a GPU.

Not in each combination: bfloat16 on NVIDIA's cards has every variant. The other types run the same code on other
registers and buffers, so they have the variants that need the most of those. What is left out is compiled by hand:
`compile_for_cards.py 80,90 float32 rows rows64 compact every`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nuteprune.kernels import tuning

pytest.importorskip("triton", reason="triton has no build for this platform")

HERE = Path(__file__).resolve().parent
SHARED_MEMORY = {"80": 163 * 1024, "90": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes a program can use: CUDA programming guide, "compute capabilities"; CDNA 3 ISA, "local data share"."""


@pytest.mark.parametrize(
    ("cards", "dtype", "variants"),
    [
        ("80,90", "bfloat16", ["bare", "gates", "rows", "rows64", "compact", "both", "pointwise"]),
        ("80,90", "float16", ["rows"]),
        ("80,90", "float32", ["bare", "gates", "both", "pointwise"]),
        ("gfx942", "bfloat16", ["gates", "rows64", "both", "pointwise"]),
        ("gfx942", "float32", ["gates", "both"]),
    ],
)
def test_tensor_cores_no_spills_fits_in_shared_memory(cards, dtype, variants):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parents[1]), env.get("PYTHONPATH")]))
    command = [sys.executable, str(HERE / "compile_for_cards.py"), cards, dtype, *variants]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["card"] for line in built} == set(cards.split(","))
    if dtype != "float16":
        check_sizes(built, cards.split(","), getattr(torch, dtype))
    for line in built:
        kind = line["label"].split()[0]
        assert line["tensor_cores"] or kind in ("finish", "pointwise"), line
        assert line["STACK"] == line["LOCAL"] == 0, f"registers spill: {line}"
        assert line["shared"] <= SHARED_MEMORY[line["card"]], line
        is_matmul = kind in ("y", "dx")
        assert line["card"] != "90" or line["wgmma"] or not is_matmul, line
        # With a sum the tile of what is added is loaded too; how W is read is seen without one.
        if "loads" in line and is_matmul and dtype != "float32" and not line["label"].endswith(" onto"):
            check_lanes(line)


def check_sizes(built: list[dict], cards: list[str], dtype: torch.dtype) -> None:
    """y and dx are compiled in every tile size that can be chosen on each card."""
    for card in cards:
        capability = int(card) if card.isdigit() else 0
        sizes = [size for scattered in (False, True) for size in tuning.options(dtype, scattered, capability)]
        for kind in ("y", "dx"):
            labels = [line["label"] for line in built if line["card"] == card and line["label"].split()[0] == kind]
            assert all(any(str(tuple(size)) in label for label in labels) for size in sizes), (card, kind)


def check_lanes(line: dict) -> None:
    """The lanes of a warp read along the contiguous dimension of W [N, K], in whole vectors where no list forbids.

    y sums over that dimension, dx does not. With a list of kept inputs a tile [K, N] in y had its lanes along N: 32 of
    them read 32 rows of 2 bytes each. Whole vectors are copied asynchronously, and are no loads then.
    """
    kind, _, variant, _, bn, bk, *_ = re.sub(r"[(),]", "", line["label"]).split()
    as_it_lies, across = [int(bn), int(bk)], [int(bk), int(bn)]
    if kind == "dx":
        as_it_lies, across = across, as_it_lies
    shapes = [tile["shape"] for tile in line["loads"]]
    assert across not in shapes or kind == "dx", line  # in dx a tile of g may have that shape
    if variant in ("compact", "both"):
        assert as_it_lies in shapes, line
        assert all(tile["order"][0] == 1 for tile in line["loads"] if tile["shape"] == as_it_lies), line
    else:
        assert as_it_lies not in shapes, line
        assert line["async_copies"], line
