"""How fast exports are in vLLM and llama.cpp, by the engines' own benchmark programs: `make bench-engines EXPORT=DIR`.

vLLM: its latency benchmark with one new token (the prefill) and with more (what is longer is decoding). llama.cpp:
`llama-batched-bench`, which times both. The intact model and the exports take turns, round by round, so that a machine
whose speed drifts biases none of them; a ratio is the median over rounds of one round's. The ceiling is what sizes
allow where time goes by the weights that are read (`nuteprune.evaluation.speed.ceiling`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nuteprune.arch import read_spec
from nuteprune.evaluation.measure import environment, sizes
from nuteprune.evaluation.speed import ceiling
from nuteprune.exporting.gguf_model import FILE, TYPES, gguf_architecture
from nuteprune.exporting.gguf_quants import K_QUANTS, write_quantized
from nuteprune.runs.log import quiet_libraries

VLLM = Path(__file__).with_name("vllm_latency.py")
PHASES = ("prefill", "decode")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="+", help="directories; llama.cpp wants model.gguf in each, all of one type")
    parser.add_argument("--intact", default="models/smollm2-135m", help="the model that they were made of")
    parser.add_argument("--vllm", help="python of an environment with vLLM")
    parser.add_argument("--llamacpp", help="path of llama-batched-bench")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of vLLM's weights: without avx512_bf16 a CPU is slow in bfloat16; llama.cpp's are those of the files",
    )
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/engines"))
    args = parser.parse_args(argv)
    quiet_libraries()
    args.out.mkdir(parents=True, exist_ok=True)
    measured = {}
    if args.vllm:
        measured[f"vLLM, {args.dtype}"] = in_vllm(args)
    if args.llamacpp:
        kind = file_type(args.exports)
        measured[f"llama.cpp, {kind}"] = in_llamacpp(args, intact_file(args, kind))
    most = ceilings(args)
    result = {"arguments": {k: str(v) for k, v in vars(args).items()}, "threads": threads(), "ceiling": most,
              "environment": environment(torch.device("cpu")), "rows": measured}  # fmt: skip
    (args.out / "engines.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(measured, args, most))
    sys.stdout.write(f"{threads()} threads, {args.rounds} rounds, {args.prompt} prompt tokens, {args.new} decoded: "
                     f"{args.out / 'engines.json'}\n")  # fmt: skip
    return 0


def threads() -> int:
    """As many as there are cores for this process."""
    return len(os.sched_getaffinity(0))


def in_vllm(args: argparse.Namespace) -> list[dict]:
    """Rows `{model, batch, round, prefill, decode}` (seconds) of vLLM's latency benchmark."""
    out = args.out / "vllm.json"
    command = [
        args.vllm, VLLM, "--json", out, "--models", args.intact, *args.exports, "--batches", *args.batches,
        "--prompt", args.prompt, "--new", args.new, "--rounds", args.rounds, "--dtype", args.dtype,
        "--gpu-memory-utilization", "0.3", "--trust-remote-code", *(["--enforce-eager"] if args.eager else []),
    ]  # fmt: skip
    settings = {
        "OMP_NUM_THREADS": str(threads()), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    with (args.out / "vllm.log").open("w") as log:
        done = subprocess.run(list(map(str, command)), env=os.environ | settings, stdout=log, stderr=log, check=False)
    if done.returncode:
        sys.exit(f"vLLM's benchmark ended with {done.returncode}: see {log.name}")
    return json.loads(out.read_text())["rows"]


def file_type(exports: list[str]) -> str:
    """The type of matrices that the GGUF files have in common, as export.gguf names it."""
    found = set()
    for directory in exports:
        file = Path(directory) / FILE
        if not file.exists():
            sys.exit(f"{file} is missing: export with --gguf f16, say")
        number = gguf.GGUFReader(file).get_field("general.file_type").contents()
        kinds = {kind: name for name, (_, kind) in TYPES.items()} | {kind: name for name, kind in K_QUANTS.items()}
        found.add(kinds[number])
    if len(found) > 1:
        sys.exit(f"the exports' {FILE} are of several types ({', '.join(sorted(found))}): export with the same --gguf")
    return found.pop()


def intact_file(args: argparse.Namespace, kind: str) -> Path:
    """The intact model as a GGUF file of that type."""
    directory = args.out / f"intact-{kind}"
    directory.mkdir(exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(args.intact, dtype=torch.float32)
    architecture = gguf_architecture(read_spec(model.config), "uniform", model.config)
    write_quantized(directory, model, AutoTokenizer.from_pretrained(args.intact), architecture, kind)
    return directory / FILE


def in_llamacpp(args: argparse.Namespace, intact: Path) -> list[dict]:
    """Rows as of `in_vllm`, of `llama-batched-bench`."""
    files = {args.intact: intact, **{directory: Path(directory) / FILE for directory in args.exports}}
    rows = []
    for turn in range(args.rounds):
        for model in files if turn % 2 == 0 else reversed(files):
            command = [
                args.llamacpp, "-m", files[model], "-npp", args.prompt, "-ntg", args.new,
                "-npl", ",".join(map(str, args.batches)), "-c", max(args.batches) * (args.prompt + args.new),
                "-t", threads(), "-tb", threads(), "--output-format", "jsonl",
            ]  # fmt: skip
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode or len(lines) != len(args.batches):
                sys.exit(f"llama-batched-bench ended with {done.returncode} on {files[model]}:\n{done.stderr[-2000:]}")
            rows += [{"model": model, "batch": line["pl"], "round": turn, "prefill": line["t_pp"],
                      "decode": line["t_tg"]} for line in lines]  # fmt: skip
    return rows


def ceilings(args: argparse.Namespace) -> dict[str, dict]:
    """The most that each export's sizes allow."""
    found = {}
    for directory in (args.intact, *args.exports):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, trust_remote_code=True)
        found[directory] = sizes(model, Path(directory))
    return {directory: ceiling(found[args.intact], found[directory]) for directory in args.exports}


def table(measured: dict[str, list[dict]], args: argparse.Namespace, most: dict[str, dict]) -> str:
    """One line for each engine, export and batch."""
    lines = [
        "| engine | export | batch | intact: prefill, decode, tokens/s | prefill | decode | ceiling | share of it |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for engine, rows in measured.items():
        for directory in args.exports:
            for batch in args.batches:
                before, after = (of(rows, model, batch) for model in (args.intact, directory))
                ratios = [
                    statistics.median(b[phase] / a[phase] for b, a in zip(before, after, strict=True))
                    for phase in PHASES
                ]
                rates = [
                    batch * tokens / statistics.median(row[phase] for row in before)
                    for phase, tokens in zip(PHASES, (args.prompt, args.new), strict=True)
                ]
                top = most[directory]["speedup"]
                lines.append(
                    f"| {engine} | {directory} | {batch} | {rates[0]:.0f}, {rates[1]:.0f} | {ratios[0]:.2f} x | "
                    f"{ratios[1]:.2f} x | {top:.2f} x | {ratios[0] / top:.0%}, {ratios[1] / top:.0%} |"
                )
    return "\n".join(lines) + "\n"


def of(rows: list[dict], model: str, batch: int) -> list[dict]:
    """One model's rows of a batch, by round."""
    return sorted((r for r in rows if (r["model"], r["batch"]) == (model, batch)), key=lambda row: row["round"])


if __name__ == "__main__":
    sys.exit(main())
