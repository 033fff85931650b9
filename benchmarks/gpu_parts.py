"""The parts of `gpu_check`: each yields lines of the report, within a budget of seconds.

Without a card a part runs on the CPU in a small form where it can, and says what it skipped where it cannot.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import median

import torch

from benchmarks.gpu_place import MET, MISSED, NUTEPRUNE, PYTHON, SKIPPED, TOLD, Line, Place, alike, kill, tail
from nuteprune.parallel.device import named, unseen_gpu
from nuteprune.planning.machine import card_of

BARS = {0.0: 1.15, 0.5: 0.65}
"""Time of the masked LoRA projection over the bare GEMM's, forward, by sparsity: at most."""
MEMORY, SECONDS = (0.8, 1.1), (0.67, 1.5)
"""What was measured over what `plan` says, of a run of 7B: at least, and at most."""
TWO_RANKS = (*PYTHON, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "nuteprune")
SMALL = {"hidden": 128, "ffn": 256, "heads": 4, "kv-heads": 2, "layers": 2}
WIDE = {"hidden": 4096, "ffn": 14336, "heads": 32, "kv-heads": 8, "layers": 2}
SEVEN_B = {"hidden": 4096, "ffn": 11008, "heads": 32, "kv-heads": 32, "layers": 32}


def device(place: Place) -> Iterator[Line]:
    """Whether torch sees the GPU that the machine has."""
    unseen = unseen_gpu()
    here = named(torch.device("cuda" if place.cuda else "cpu"))
    verdict = MISSED if unseen else MET if place.cuda else SKIPPED
    yield Line("torch sees the machine's GPU", "yes", unseen or here, verdict)


def kernel_tests(place: Place) -> Iterator[Line]:
    """Values and gradients of the kernels; the interpreter's are part of `make test`."""
    tests = ["tests/kernels"] if place.cuda else ["tests/kernels/test_kernels_autograd.py"]
    # What is drawn by hypothesis compiles a kernel an example; what needs no card runs in `make test`.
    left_out = ["-k", "not anything and not name and not shared_memory and not bench"]
    several = place.cuda and find_spec("xdist")
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if several else []
    command = (*PYTHON, "pytest", "-q", *tests, *left_out, *workers)
    wrong = place.run("kernel-tests", *command, TRITON_INTERPRET="0" if place.cuda else "1")
    where = "on the card" if place.cuda else "under triton's interpreter: one file of them"
    found = wrong or tail(place.out / "kernel-tests.log")
    yield Line(f"kernel tests, {where}", "all pass", found, MISSED if wrong else MET)


def kernel_times(place: Place) -> Iterator[Line]:
    """The masked LoRA projection against the bare GEMM."""
    record = place.out / "kernels.json"
    flags = ["--quick", "--others"]  # none
    wrong = place.run("kernels", *PYTHON, "benchmarks.kernels", "--json", str(record), *flags)
    if wrong:
        yield Line("kernel times", "a table", wrong, MISSED)
        return
    rows = json.loads(record.read_text(encoding="utf-8"))["rows"]
    for sparsity, bar in BARS.items():
        for row in (r for r in rows if r["sparsity"] == sparsity):
            ratio = row["ours"]["forward_ms"] / row["gemm"]["forward_ms"]
            name = f"{row['model']} {row['projection']}, {row['tokens']} tokens, rank {row['rank']}, {sparsity:.0%}"
            verdict = (MET if ratio <= bar else MISSED) if place.cuda else TOLD
            wanted = f"{bar:.2f}" if place.cuda else "on a GPU only"
            yield Line(f"{name}: forward over GEMM", wanted, f"{ratio:.2f}", verdict)


def options(place: Place) -> Iterator[Line]:
    """What a run may turn on, in short runs of a random model: bfloat16, checkpointing, determinism, offload."""
    half = "model.dtype=bfloat16"
    exact = (half, "train.deterministic=true")
    runs = {
        "float32": ("model.dtype=float32",),
        "bfloat16": (half,),
        "checkpointing": (half, "train.activation_checkpointing=true"),
        "offload": (half, "deepspeed=zero3_offload"),
        "exact": exact,
        "exact-again": exact,
    }
    wrong = place.random_model("small", SMALL)
    for name, settings in runs.items():
        wrong = wrong or place.prune(name, "small", *settings)
        if wrong:
            yield Line(f"a run in {name}", "runs", wrong, MISSED)
            return
    curves = {name: place.metrics(name, "loss") for name in runs}
    yield alike("bfloat16 against float32", curves["float32"], curves["bfloat16"], 2e-2)
    yield alike("activation checkpointing, bfloat16", curves["bfloat16"], curves["checkpointing"], 2e-2)
    yield alike("ZeRO-3 with the weights in host memory", curves["bfloat16"], curves["offload"], 2e-2)
    yield alike("train.deterministic, two runs", curves["exact"], curves["exact-again"], 0.0)


def refit(place: Place) -> Iterator[Line]:
    """Least squares for the FFN units that stay, in layers as wide as those of 8B."""
    sizes = WIDE if place.cuda else SMALL
    short = ("model.dtype=bfloat16", "train.steps=12", "data.seq_len=512", "gates.settle=0.5")
    began, wrong = time.monotonic(), place.random_model("wide", sizes)
    wrong = wrong or place.prune("refit", "wide", *(short if place.cuda else short[:2]))
    what = f"refit of two layers of {sizes['ffn']:,} FFN units"
    if wrong:
        yield Line(what, "runs", wrong, MISSED)
        return
    finite = all(map(math.isfinite, place.metrics("refit", "loss")))
    peak = place.metrics("refit", "peak_memory_gb")[-1]
    found = f"{time.monotonic() - began:.0f} s with model and start, {peak:.1f} GB"
    yield Line(what, "finite losses", found, MET if finite else MISSED)


def planned(place: Place) -> Iterator[Line]:
    """Ten steps of a random model of 7B under README's settings: memory and time beside the plan's."""
    sizes, length = (SEVEN_B, 512) if place.cuda else (SMALL, 64)
    settings = [
        "model.dtype=bfloat16", "train.steps=10", "train.batch_size=16", "train.micro_batch=2", "lora.refit=0",
        "train.activation_checkpointing=true", "sparsity.target=0.2", f"data.seq_len={length}",
    ]  # fmt: skip
    name, total = "NVIDIA H100", 80e9
    if place.cuda:
        facts = torch.cuda.get_device_properties(0)
        name, total = facts.name, facts.total_memory
    wrong = place.random_model("seven", sizes)
    card = ("--gpus-per-node", "1", "--gpu", card_of(name).name, "--gpu-memory", f"{total / 1e9:.1f}GB", "--json")
    model = str(place.models / "seven")
    wrong = wrong or place.run("plan", *NUTEPRUNE, "plan", "--model", model, *card, *settings)
    wrong = wrong or place.prune("seven-run", "seven", *settings, f"gates.importance_tokens={16 * length}")
    what = "ten steps of a random 7B, micro-batch 2, checkpointing" if place.cuda else "ten steps of a tiny model"
    if wrong:
        yield Line(what, "runs", wrong, MISSED)
        return
    text = (place.out / "plan.log").read_text(encoding="utf-8")
    memory, seconds = planned_figures(json.loads(text[text.index("{") : text.rindex("}") + 1]))
    measured = place.metrics("seven-run", "peak_memory_gb")[-1], median(place.metrics("seven-run", "step_s")[5:])
    for name, unit, found, plan, (least, most) in (
        ("peak memory", "GB", measured[0], memory, MEMORY), ("a step", "s", measured[1], seconds, SECONDS),
    ):  # fmt: skip
        bar = f"{least} to {most} of the plan's {plan:.2f} {unit}"
        verdict = (MET if least <= found / plan <= most else MISSED) if place.cuda else TOLD
        yield Line(f"{what}: {name}", bar if place.cuda else "on a GPU only", f"{found:.2f} {unit}", verdict)


def planned_figures(plan: dict) -> tuple[float, float]:
    """GB and seconds a step that a plan says of micro-batch 2 with checkpointing and whole weights."""
    layout = {"stage": 0, "micro_batch": 2, "checkpointing": True, "offload": False}
    options = [plan["chosen"], *plan["tried"]]
    same = [option for option in options if layout.items() <= option["layout"].items()]
    option = (same or options)[0]
    return option["memory"]["peak"] / 1e9, option["time"]["step"]


def demo(place: Place) -> Iterator[Line]:
    """SmolLM2-135M pruned by a fifth, exported and compared."""
    if not place.cuda:
        yield Line("the demo", "runs", "`make demo` runs it on a CPU", SKIPPED)
        return
    for stage in ("prune", "export", "evaluate"):
        began = time.monotonic()
        wrong = place.run(stage, *NUTEPRUNE, stage, "recipe=demo", f"run_dir={place.out / 'demo'}")
        found = wrong or f"{time.monotonic() - began:.0f} s"
        yield Line(f"the demo: {stage}", "runs", found, MISSED if wrong else MET)
        if wrong:
            return
    ratio = json.loads((place.out / "demo" / "evaluate" / "report.json").read_text(encoding="utf-8"))["ratio"]
    worst = max(ratio["perplexity"].values())
    what = "the demo: perplexity over the intact model's"
    yield Line(what, "1.25", f"{worst:.2f}", MET if worst <= 1.25 else MISSED)


def two_ranks(place: Place) -> Iterator[Line]:
    """A run on two ranks under each ZeRO stage that is killed after its first checkpoint, and goes on."""
    if place.cuda and torch.cuda.device_count() < 2:
        yield Line("two ranks over NCCL, killed and resumed", "same losses", "one card is here", SKIPPED)
        return
    links = "NCCL" if place.cuda else "gloo on the CPU"
    wrong = place.random_model("small", SMALL)
    for stage in ("zero2", "zero3", "zero3_hpz"):
        whole, cut = (place.settings(f"{stage}-{n}", "small", f"deepspeed={stage}") for n in ("whole", "cut"))
        what = f"{stage}, two ranks over {links}, killed and resumed"
        wrong = wrong or place.run(stage, *TWO_RANKS, "prune", *whole)
        wrong = wrong or _kill_after_checkpoint(place, stage, cut)
        wrong = wrong or place.run(f"{stage}-again", *TWO_RANKS, "prune", *cut)
        if wrong:
            yield Line(what, "losses within 1e-3", wrong, MISSED)
            return
        yield alike(what, place.metrics(f"{stage}-whole", "loss"), place.metrics(f"{stage}-cut", "loss"), 1e-3)


def _kill_after_checkpoint(place: Place, stage: str, settings: list[str]) -> str:
    """Start a run, and kill its launcher and ranks after a checkpoint; returns what went wrong."""
    with open(place.out / f"{stage}-cut.log", "w", encoding="utf-8") as file:
        process = subprocess.Popen([*TWO_RANKS, "prune", *settings], stdout=file, stderr=subprocess.STDOUT)
    made = place.out / f"{stage}-cut" / "checkpoints"
    while process.poll() is None and not list(made.glob("step-*/manifest.json")) and time.monotonic() < place.until:
        time.sleep(0.1)
    killed = kill(process)
    return "" if process.returncode == -signal.SIGKILL and killed > 2 else "ended before it could be killed"


def flash_attention(place: Place) -> Iterator[Line]:
    """The same steps with flash-attn and with torch's own attention."""
    name = "flash attention against torch's"
    if not place.cuda or find_spec("flash_attn") is None:
        found = "flash-attn is not installed" if place.cuda else "needs a card"
        yield Line(name, "losses within 2e-2", found, SKIPPED)
        return
    wrong = place.random_model("small", SMALL)
    for attention in ("sdpa", "flash_attention_2"):
        chosen = ("model.dtype=bfloat16", f"model.attention={attention}")
        wrong = wrong or place.prune(attention, "small", *chosen)
    if wrong:
        yield Line(name, "losses within 2e-2", wrong, MISSED)
        return
    yield alike(name, place.metrics("sdpa", "loss"), place.metrics("flash_attention_2", "loss"), 2e-2)


PARTS: dict[str, tuple[int, Callable[[Place], Iterator[Line]]]] = {
    "device": (5, device),
    "kernel-tests": (110, kernel_tests),
    "kernel-times": (45, kernel_times),
    "options": (90, options),
    "refit": (40, refit),
    "planned": (105, planned),
    "demo": (130, demo),
    "flash-attention": (40, flash_attention),
    "two-ranks": (180, two_ranks),
}
"""Seconds that a part may take on a card, and the part; the last two need flash-attn and a second card."""
