"""Time and peak memory of the masked LoRA projection against eager torch, peft and the bare GEMM.

python -m benchmarks.kernels [--quick] [--others NAME …] [--json PATH]

On a GPU: the projections of LLaMA-7B, LLaMA-13B and Llama-3.1-8B in bf16, triton. Elsewhere: smaller ones in fp32
through the torch path, so that the bench itself is known to work; the columns that need a GPU say "not measured".
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuteprune.kernels import reference
from nuteprune.kernels.api import masked_lora_linear

# (name, K, N, which side has the FFN or head gates) of the distinct projections of each model
MODELS = {
    "LLaMA-7B": [("q", 4096, 4096, "out"), ("gate", 4096, 11008, "out"), ("down", 11008, 4096, "in")],
    "LLaMA-13B": [("q", 5120, 5120, "out"), ("gate", 5120, 13824, "out"), ("down", 13824, 5120, "in")],
    "Llama-3.1-8B": [
        ("q", 4096, 4096, "out"),
        ("k", 4096, 1024, "out"),
        ("gate", 4096, 14336, "out"),
        ("down", 14336, 4096, "in"),
    ],
}
REDUCED = {"SmolLM2-135M": [("q", 576, 576, "out"), ("gate", 576, 1536, "out"), ("down", 1536, 576, "in")]}
OTHERS = ("eager", "peft")
CONTENDERS = ("ours", *OTHERS, "gemm")
NOT_MEASURED = "not measured"


class Problem:
    """Leaves of one row of the table. Half the gates are removed at sparsity 50%, the kept ones are fractional."""

    def __init__(self, k: int, n: int, side: str, tokens: int, rank: int, sparsity: float, device: str):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device, generator=generator) * scale).to(dtype)

        self.x = normal(tokens, k).requires_grad_()
        self.weight = nn.Parameter(normal(n, k, scale=k**-0.5), requires_grad=False)
        self.lora_a = normal(rank, k, scale=k**-0.5).requires_grad_()
        self.lora_b = normal(n, rank, scale=rank**-0.5).requires_grad_()
        size = k if side == "in" else n
        gate = torch.rand(size, device=device, generator=generator) * 0.9 + 0.1
        gate[torch.randperm(size, device=device, generator=generator)[: int(size * sparsity)]] = 0
        self.gates = {f"{side}_gate": gate.to(dtype).requires_grad_()}
        self.keep = {f"keep_{side}": gate.nonzero().flatten()}
        self.side = side

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.lora_a, self.lora_b, *self.gates.values()]


def ours(p: Problem) -> Callable[[], Tensor]:
    return lambda: masked_lora_linear(p.x, p.weight, None, p.lora_a, p.lora_b, 1.0, **p.gates, **p.keep)


def eager(p: Problem) -> Callable[[], Tensor]:
    return lambda: reference.reference_linear(p.x, p.weight, None, p.lora_a, p.lora_b, 1.0, **p.gates)


def peft_layer(p: Problem) -> Callable[[], Tensor]:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    n, k = p.weight.shape
    base = nn.Linear(k, n, bias=False, device="meta")
    base.weight = p.weight
    rank = p.lora_a.shape[0]
    layer = Linear(base, "default", config=LoraConfig(r=rank, lora_alpha=rank), r=rank, lora_alpha=rank)
    layer.to(p.weight.device, p.weight.dtype)
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = p.lora_a.data, p.lora_b.data
    (gate,) = p.gates.values()
    p.lora_a, p.lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return lambda: layer(p.x * gate) if p.side == "in" else layer(p.x) * gate


def gemm(p: Problem) -> Callable[[], Tensor]:
    p.lora_a, p.lora_b, p.gates = p.x, p.x, {}  # only dx has a gradient here
    return lambda: F.linear(p.x, p.weight)


MAKERS = dict(zip(CONTENDERS, (ours, eager, peft_layer, gemm), strict=True))


def milliseconds(call: Callable[[], object], device: str, repeats: int, graph: bool = False) -> float:
    """Median time of a call: CUDA events with a cold L2 cache on a GPU, the wall clock elsewhere.

    With `graph` the calls are replayed from a CUDA graph, so that a call which is shorter on the card than its launch
    on the host is not timed by the host; the caches are warm then.
    """
    if device == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph

        if graph:
            return do_bench_cudagraph(call, rep=100, return_mode="median")
        return do_bench(call, warmup=50, rep=200, return_mode="median")
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def peak_mib(call: Callable[[], object], device: str) -> float | str:
    if device != "cuda":
        return NOT_MEASURED
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def measure(maker: Callable, problem: Problem, device: str, repeats: int) -> dict:
    """{"forward_ms", "backward_ms", "peak_mib"} of one contender."""
    call = maker(problem)
    y = call()
    grad = torch.randn_like(y)
    leaves = list({id(leaf): leaf for leaf in problem.leaves}.values())
    backward = milliseconds(lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True), device, repeats)
    with torch.no_grad():
        forward = milliseconds(call, device, repeats, graph=True)
    peak = peak_mib(lambda: torch.autograd.grad(call(), leaves, grad), device)
    return {"forward_ms": round(forward, 4), "backward_ms": round(backward, 4), "peak_mib": peak}


def rows(device: str, quick: bool, others: Sequence[str] = OTHERS) -> list[dict]:
    """One row a shape: what it was, and each contender's numbers."""
    on_gpu = device == "cuda"
    models, repeats = (MODELS if on_gpu else REDUCED), 3 if quick else 9
    tokens = [2048, 8192] if on_gpu else [256] if quick else [1024]
    ranks = [8] if quick else [8, 16]
    table = []
    for model, projections in models.items():
        for (name, k, n, side), m, rank, sparsity in product(projections, tokens, ranks, (0.0, 0.25, 0.5)):
            setup = (k, n, side, m, rank, sparsity, device)
            row = {"model": model, "projection": name, "K": k, "N": n, "tokens": m, "rank": rank, "sparsity": sparsity}
            for contender, maker in MAKERS.items():
                skip = contender not in ("ours", "gemm", *others)
                row[contender] = NOT_MEASURED if skip else measure(maker, Problem(*setup), device, repeats)
            table.append(row)
        if quick and on_gpu:
            break
    return table


def machine(device: str) -> dict:
    """Card, driver, versions and date, for the record."""
    facts = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "torch": torch.__version__}
    facts |= {"threads": torch.get_num_threads(), "cpu": platform.processor() or platform.machine()}
    facts |= {"card": NOT_MEASURED, "driver": NOT_MEASURED}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["card"] = torch.cuda.get_device_name()
        if torch.version.cuda:
            facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return facts


def markdown(facts: dict, table: list[dict]) -> str:
    """The table: forward / backward ms, and ours relative to the bare GEMM."""
    head = ["model", "proj", "M", "R", "sparsity", *CONTENDERS, "fwd / GEMM", "bwd / GEMM", "peak MiB"]
    lines = [f"card: {facts['card']}, driver: {facts['driver']}, torch {facts['torch']}, {facts['date']}", ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in table:
        times = [
            row[c] if isinstance(row[c], str) else f"{row[c]['forward_ms']:.3f} / {row[c]['backward_ms']:.3f}"
            for c in CONTENDERS
        ]
        ratios = [f"{row['ours'][t] / row['gemm'][t]:.2f}" for t in ("forward_ms", "backward_ms")]
        shape = [row["model"], row["projection"], row["tokens"], row["rank"], f"{row['sparsity']:.0%}"]
        lines.append(f"| {' | '.join(map(str, [*shape, *times, *ratios, row['ours']['peak_mib']]))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one rank, and few repeats or one model")
    parser.add_argument("--json", type=Path, help="also write everything that was measured to this file")
    parser.add_argument("--others", nargs="*", default=OTHERS, help=f"beside ours and gemm ({', '.join(OTHERS)})")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts, table = machine(device), rows(device, arguments.quick, arguments.others)
    sys.stdout.write(markdown(facts, table))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": facts, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
