"""Compiles the kernels' configurations for sm_80, sm_90 and gfx942 without a GPU; prints a JSON line per compilation.

Run in a process of its own: TRITON_INTERPRET must not be set. The calls are those that the launchers would make at the
sizes of LLaMA-7B's down projection, through triton's own JIT and its specialisation; only the driver is a stand-in.

    compile_for_cards.py CARD[,CARD…] TYPE VARIANT… [every]

Every tile size is compiled with gates and bias (`FULL`), as `tuning.py` says, and with a sum; the other variants are
in the last of their sizes, the largest. `every` compiles those in all sizes too.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nuteprune.kernels import launch, pointwise, rowwise, triton_kernels, tuning
from nuteprune.kernels.product import Product

M, N, K = 2048, 4096, 11008
CARDS = {
    "80": GPUTarget("cuda", 80, 32),
    "90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),  # AMD MI300
}
# (gates and bias, a list of kept inputs, a list of kept outputs, inputs compact, rank)
VARIANTS = {
    "bare": (False, False, False, False, 16),
    "gates": (True, False, False, False, 16),
    "rows": (True, False, True, False, 16),
    "rows64": (True, False, True, False, 64),
    "compact": (True, True, False, True, 16),
    "both": (True, True, True, False, 16),
}
FULL = ("gates", "both")
"""The one has all dense sizes, the other all scattered ones."""


class Card:
    """What triton's JIT asks of a driver in order to compile."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> int:
        """What triton keeps compiled kernels by: each card its own."""
        return self.target.arch if isinstance(self.target.arch, int) else 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def resource_usage(cubin: bytes) -> dict[str, int]:
    """cuobjdump's REG, STACK and LOCAL of the one kernel in a cubin; spilled registers appear as stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}


def loads(ttgir: str) -> list[dict]:
    """Shape and layout of each tile of 16-bit numbers that is loaded."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<.*>)$", ttgir, re.MULTILINE))
    found = []
    for shape, layout in re.findall(r"tt\.load .*?tensor<(\d+x\d+)x!tt\.ptr<b?f16>, (#\w+)>", ttgir):
        numbers = {k: [int(n) for n in v.split(", ")] for k, v in re.findall(r"(\w+) = \[([\d, ]+)\]", layouts[layout])}
        found.append({"shape": [int(n) for n in shape.split("x")], **numbers})
    return found


def of_nvidia(asm: dict) -> dict:
    """What the test asks of the code for an NVIDIA card."""
    ptx = asm["ptx"]
    return {
        "tensor_cores": "wgmma.mma_async" in ptx or "mma.sync" in ptx,
        "wgmma": "wgmma.mma_async" in ptx,
        "async_copies": "cp.async" in ptx,
        "loads": loads(asm["ttgir"]),
        **resource_usage(asm["cubin"]),
    }


def of_amd(asm: dict) -> dict:
    """The same of the code for an AMD card; of its registers the vector ones spill to memory, scalar ones to those."""
    spilled = re.findall(r"\.vgpr_spill_count: *(\d+)", asm["amdgcn"])
    assert spilled, "no count of spilled registers"
    return {"tensor_cores": "v_mfma" in asm["amdgcn"], "STACK": sum(map(int, spilled)), "LOCAL": 0}


def report(label: str, card: str, kernel, positional: tuple, keywords: dict) -> None:
    driver.set_active(Card(CARDS[card]))
    built = kernel.warmup(*positional, **keywords, grid=(1,))
    found = of_nvidia(built.asm) if card.isdigit() else of_amd(built.asm)
    line = {"label": label, "card": card, "shared": built.metadata.shared, **found}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def product_of_x(dtype: torch.dtype, variant: str, rank: int | None = None) -> tuple[Product, torch.Tensor]:
    """A product and its x on the meta device."""
    gated, keep_in, keep_out, compact, own_rank = VARIANTS[variant]
    rank = rank or own_rank

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    gates = (meta(N), meta(K, dtype=torch.float32), meta(N, dtype=torch.float32)) if gated else (None,) * 3
    lists = [meta(size // 2, dtype=torch.int64) if kept else None for size, kept in ((K, keep_in), (N, keep_out))]
    x = meta(M, K // 2 if compact else K)
    lora = (meta(rank, K), meta(N, rank))
    return Product(meta(N, K), gates[0], *lora, *gates[1:], *lists, 0.5, compact, False), x


def matmuls(cards: list[str], dtype: torch.dtype, variant: str, every: bool) -> None:
    """Forward and dx, in every tile size that could be chosen or in the largest."""
    forward, x = product_of_x(dtype, variant)
    for name, product, source in (("y", forward, x), ("dx", forward.back, x.new_empty(M, N))):
        y, u = launch.empty_output(product, source), launch.empty_u(product, source, lasting=True)
        for card in cards:
            sizes = tuning.options(dtype, product.scattered, int(card) if card.isdigit() else 0)
            for config in sizes:
                for add in (False, True) if name == "dx" and not VARIANTS[variant][0] else (False,):
                    if not (every or add or variant in FULL or config == sizes[-1]):
                        continue
                    tiles = launch.Tiles(product, source, y, launch.fuses_u(product), config, add)
                    label = f"{name} {dtype} {variant} {tuple(config)}{' onto' * add}"
                    arguments = tiles.arguments(product, source, u, y)
                    report(label, card, triton_kernels.matmul, arguments, tiles.options)


def small_kernels(cards: list[str], dtype: torch.dtype, variant: str) -> None:
    """The separate xAᵀ of a large rank, and the reductions of the small gradients."""
    product, x = product_of_x(dtype, variant, rank=128)
    u = x.new_empty(M, 128)
    for card in cards:
        alone = product.skinny
        tiles = launch.Tiles(alone, x, u, False, tuning.skinny(128, dtype))
        arguments = tiles.arguments(alone, x, None, u)
        report(f"skinny {dtype} {variant}", card, triton_kernels.matmul, arguments, tiles.options)
        _, positional, keywords = launch.reduce_call(x, u, x, product.keep_in, product.compact_in)
        report(f"reduce {dtype} {variant}", card, triton_kernels.column_reduce, positional, keywords)
        sums, n = positional[3:5], positional[7]
        gate = product.in_gate
        outputs = (torch.empty(128, K, device="meta"), None if gate is None else torch.empty(K, device="meta"))
        call = (*sums, gate, product.keep_in, *outputs, n, 128, 4, 1.0, 1, K)
        options = {name: keywords[name] for name in ("RANK", "BC")} | {"ADD": True}
        report(f"finish {dtype} {variant}", card, triton_kernels.finish_reduce, call, options)


def pointwise_kernels(cards: list[str], dtype: torch.dtype) -> None:
    """Norm, rotary positions and activation, each way, at the sizes of LLaMA-7B and the widest hidden."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for width in (N, 16384):
        x, weight = meta(M, width), meta(width)
        _, tiles = rowwise.row_tiles(M, width)
        q, angles = meta(1, 32, M, 128), meta(1, M, 128)
        turn = (q, q, angles, angles, q, q, M, 32, *[M * 128, 128, 32 * 128] * 4, 0, 128)
        calls = {
            "rms_norm": ((x, weight, x, M, width, 1e-6, 0.0, width), tiles | {"ROUND": True}),
            "rms_norm_backward": ((x, x, weight, x, M, width, 1e-6, 0.0, width, width), tiles),
            "rotary": (turn, {"P": 128, "HALF": 64, "TRANSPOSED": True, "ROWS": 32}),
            "gated": ((x, x, x, M * width), {"GELU": True, "BLOCK": 1024}),
            "gated_backward": ((x, x, x, x, x, M * width), {"GELU": False, "BLOCK": 1024}),
        }
        for card in cards:
            for name, call in calls.items():
                report(f"pointwise {dtype} {name} {width}", card, getattr(pointwise, name), *call)


def main(card_names: str, dtype_name: str, *variants: str) -> None:
    """Compile for cards with commas between their names."""
    cards, dtype = card_names.split(","), getattr(torch, dtype_name)
    if any(CARDS[card].backend == "hip" for card in cards):
        assert len(cards) == 1
        torch.version.hip = "a build for ROCm"  # what the launchers ask torch for
    for variant in (v for v in variants if v in VARIANTS):
        matmuls(cards, dtype, variant, "every" in variants)
        small_kernels(cards, dtype, variant)
    if "pointwise" in variants:
        pointwise_kernels(cards, dtype)


if __name__ == "__main__":
    assert not tuning.INTERPRETING
    main(*sys.argv[1:])
