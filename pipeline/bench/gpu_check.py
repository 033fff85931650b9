"""Everything that only a GPU can tell, in one go, as one Markdown report: `make gpu-check`.

Kernel tests on the card, the kernels' times against their bars, host syncs of a step, the demo, two ranks over NCCL
that are killed and go on, and flash attention where it is installed. Without a card what can be run is run on the CPU
in a small form, and the report says what was skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nuteprune.evaluation.measure import environment
from nuteprune.kernels.bench import NOT_MEASURED, machine

MET, MISSED, SKIPPED, TOLD = "met", "**missed**", "skipped", "-"
BARS = {0.0: 1.15, 0.5: 0.65}
"""Time of the fused projection over the bare GEMM's, forward, by sparsity: at most."""
STEPS, EVERY = 24, 4


@dataclass(frozen=True)
class Line:
    """One line of the report: what was checked, its bar, what came out, and whether the bar is met."""

    what: str
    bar: str
    found: str
    verdict: str


def run(command: list[str], log: Path, **variables: str) -> int:
    """Run a command with its output in a log; returns its exit code."""
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | variables)
    return done.returncode


def tail(log: Path) -> str:
    """The last line of a log, for a table."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:160].replace("|", "/") if lines else "no output"


def kernel_tests(out: Path, cuda: bool) -> Iterator[Line]:
    """Values and gradients of the kernels; the interpreter's are part of `make test`."""
    tests, log = "tests/kernels" if cuda else "tests/kernels/test_kernels_autograd.py", out / "kernel-tests.log"
    command = [sys.executable, "-m", "pytest", "-q", tests]
    code = run(command, log, TRITON_INTERPRET="0" if cuda else "1")
    where = "on the card" if cuda else "under triton's interpreter: one file of them"
    yield Line(f"kernel tests, {where}", "all pass", tail(log), MISSED if code else MET)


def kernel_times(out: Path, cuda: bool) -> Iterator[Line]:
    """The fused projection against the bare GEMM."""
    record, log = out / "kernels.json", out / "kernels.log"
    quick = [] if cuda else ["--quick"]
    if run([sys.executable, "-m", "nuteprune.kernels.bench", "--json", str(record), *quick], log):
        yield Line("kernel times", "a table", tail(log), MISSED)
        return
    rows = json.loads(record.read_text(encoding="utf-8"))["rows"]
    for sparsity, bar in BARS.items():
        for row in (r for r in rows if r["sparsity"] == sparsity):
            ratio = row["ours"]["forward_ms"] / row["gemm"]["forward_ms"]
            name = f"{row['model']} {row['projection']}, {row['tokens']} tokens, rank {row['rank']}, {sparsity:.0%}"
            verdict = (MET if ratio <= bar else MISSED) if cuda else TOLD
            yield Line(f"{name}: forward over GEMM", f"{bar:.2f}" if cuda else "on a GPU only", f"{ratio:.2f}", verdict)


def waits(out: Path, cuda: bool) -> Iterator[Line]:
    """Host syncs of a step, counted with launches stubbed (on the CPU in any case)."""
    from nuteprune.bench.overhead import BARS as syncs
    from nuteprune.bench.overhead import counts

    for phase, bar in syncs.items():
        found = counts(40, phase).waits.total()
        yield Line(
            f"host syncs of a step at 40 layers, gates {phase}", str(bar), str(found), MET if found <= bar else MISSED
        )


def demo(out: Path, cuda: bool) -> Iterator[Line]:
    """SmolLM2-135M pruned by a fifth, exported and compared."""
    if not cuda:
        yield Line("the demo", "runs", "takes 11 minutes on two cores: `make demo`", SKIPPED)
        return
    for stage in ("prune", "export", "evaluate"):
        log, began = out / f"demo-{stage}.log", time.perf_counter()
        code = run([sys.executable, "-m", "nuteprune", stage, "recipe=demo", f"run_dir={out / 'demo'}"], log)
        found = tail(log) if code else f"{time.perf_counter() - began:.0f} s"
        yield Line(f"the demo: {stage}", "runs", found, MISSED if code else MET)
        if code:
            return
    ratio = json.loads((out / "demo" / "evaluate" / "report.json").read_text(encoding="utf-8"))["ratio"]
    quality = max(ratio["perplexity"].values())
    yield Line(
        "the demo: perplexity over the intact model's", "1.25", f"{quality:.2f}", MET if quality <= 1.25 else MISSED
    )


def tiny_run(out: Path, name: str, tokenizer: str, text: str, *settings: str) -> list[str]:
    """Settings of a short run of a random model of two layers, which is made here."""
    path = out / "tiny"
    if not path.is_dir():
        torch.manual_seed(0)
        tokens = AutoTokenizer.from_pretrained(tokenizer)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), num_hidden_layers=2, **sizes)).save_pretrained(path)
        tokens.save_pretrained(path)
    return [
        f"run_dir={out / name}", f"model.path={path}", f"data.source={text}", "data.documents=0", "data.seq_len=64",
        f"train.steps={STEPS}", "train.batch_size=4", "gates.importance_tokens=1", "gates.ffn_multiple=8",
        f"checkpoint.every={EVERY}", "tracking.progress=false", "tracking.tensorboard=false", "seed=1", *settings,
    ]  # fmt: skip


def losses(run_dir: Path) -> list[float]:
    """The loss of each step of a run."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [m["prune/loss"] for m in map(json.loads, lines) if "prune/loss" in m]


def two_ranks(out: Path, cuda: bool, model: str, text: str) -> Iterator[Line]:
    """A run on two ranks under each ZeRO stage that is killed after its first checkpoint, and goes on."""
    if cuda and torch.cuda.device_count() < 2:
        yield Line("two ranks over NCCL, killed and resumed", "same losses", "one card is here", SKIPPED)
        return
    links = "NCCL" if cuda else "gloo on the CPU"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "nuteprune",
    ]
    for stage in ("zero2", "zero3"):
        whole, cut = (tiny_run(out, f"{stage}-{n}", model, text, f"deepspeed={stage}") for n in ("whole", "cut"))
        log = out / f"{stage}.log"
        code, killed = run([*launcher, "prune", *whole], log), True
        if not code:
            killed = _kill_after_checkpoint([*launcher, "prune", *cut], out / f"{stage}-cut", out / f"{stage}-cut.log")
            code = run([*launcher, "prune", *cut], log)
        if code or not killed:
            found = tail(log) if code else "ended before it could be killed"
            yield Line(f"{stage}, two ranks over {links}, killed and resumed", "same losses", found, MISSED)
            continue
        pairs = list(zip(losses(out / f"{stage}-whole"), losses(out / f"{stage}-cut"), strict=True))
        apart = max(abs(a - b) / abs(a) for a, b in pairs)
        verdict = MET if apart < 1e-3 else MISSED
        yield Line(
            f"{stage}, two ranks over {links}, killed and resumed", "losses within 1e-3", f"{apart:.1e}", verdict
        )


def _kill_after_checkpoint(command: list[str], run_dir: Path, log: Path) -> bool:
    """Start a run, and kill its launcher and all its ranks, which are sessions of their own, after a checkpoint.

    Returns whether they were still running.
    """
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    while process.poll() is None and not list(run_dir.glob("checkpoints/step-*/manifest.json")):
        time.sleep(0.1)
    killed = []
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        killed = [launcher, *launcher.children(recursive=True)]
    for one in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    code = process.wait()
    psutil.wait_procs(killed[1:])
    return code == -signal.SIGKILL and len(killed) > 2


def flash_attention(out: Path, cuda: bool, model: str, text: str) -> Iterator[Line]:
    """The same steps with flash-attn and with torch's own attention."""
    name = "flash attention against torch's"
    if not cuda or find_spec("flash_attn") is None:
        yield Line(name, "losses within 2e-2", "flash-attn is not installed" if cuda else "needs a card", SKIPPED)
        return
    curves = []
    for attention in ("sdpa", "flash_attention_2"):
        settings = tiny_run(out, attention, model, text, "model.dtype=bfloat16", f"model.attention={attention}")
        log = out / f"{attention}.log"
        if run([sys.executable, "-m", "nuteprune", "prune", *settings], log):
            yield Line(name, "losses within 2e-2", tail(log), MISSED)
            return
        curves.append(losses(out / attention))
    apart = max(abs(a - b) / abs(a) for a, b in zip(*curves, strict=True))
    yield Line(name, "losses within 2e-2", f"{apart:.1e}", MET if apart < 2e-2 else MISSED)


def markdown(facts: dict, lines: list[Line]) -> str:
    """The report."""
    counts = {verdict: sum(line.verdict == verdict for line in lines) for verdict in (MET, MISSED, SKIPPED)}
    parts = ["# GPU check", f"{counts[MET]} met, {counts[MISSED]} missed, {counts[SKIPPED]} skipped."]
    parts.append("\n".join(f"- {key}: {value}" for key, value in facts.items() if value is not None))
    table = ["| check | bar | found | |", "|---|---|---|---|"]
    table += [f"| {line.what} | {line.bar} | {line.found} | {line.verdict} |" for line in lines]
    return "\n\n".join([*parts, "\n".join(table)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Check and write the report; the exit code is 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m", help="whose tokenizer the short runs use")
    parser.add_argument("--text", default="models/demo-text/train.txt")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    args = parser.parse_args(argv)
    out, cuda = args.out / time.strftime("%Y%m%d-%H%M%S"), torch.cuda.is_available()
    out.mkdir(parents=True)
    device = torch.device("cuda" if cuda else "cpu")
    facts = environment(device) | {"driver": machine(device.type)["driver"], "cards": torch.cuda.device_count()}
    facts["flash-attn"] = "installed" if find_spec("flash_attn") else "not installed"
    if facts["driver"] == NOT_MEASURED:
        facts["driver"] = "no card here: what follows ran on the CPU"
    lines: list[Line] = []
    checks: dict[str, Callable[[], Iterator[Line]]] = {
        "kernel tests": lambda: kernel_tests(out, cuda),
        "kernel times": lambda: kernel_times(out, cuda),
        "host syncs": lambda: waits(out, cuda),
        "the demo": lambda: demo(out, cuda),
        "two ranks": lambda: two_ranks(out, cuda, args.model, args.text),
        "flash attention": lambda: flash_attention(out, cuda, args.model, args.text),
    }
    report = args.out / "report.md"
    for name, check in checks.items():
        try:
            lines += check()
        except Exception as error:  # whatever it is: the other checks go on
            (out / f"{name}.log").write_text(traceback.format_exc(), encoding="utf-8")
            lines.append(Line(name, "runs", f"{type(error).__name__}: see {name}.log", MISSED))
        report.write_text(markdown(facts, lines), encoding="utf-8")  # after each: what ends the check costs one part
    sys.stdout.write(report.read_text(encoding="utf-8") + f"\nlogs: {out}\n")
    return int(any(line.verdict == MISSED for line in lines))


if __name__ == "__main__":
    sys.exit(main())
