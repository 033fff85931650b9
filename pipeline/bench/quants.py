"""Bytes, perplexity and tokens/s in llama.cpp of an export and its base in several types: `make bench-quants`."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from nuteprune.arch import read_spec
from nuteprune.errors import UserError
from nuteprune.exporting.card import RECORD
from nuteprune.exporting.gguf_model import FILE, gguf_architecture
from nuteprune.exporting.gguf_quants import llama_cpp, write_quantized
from nuteprune.exporting.modeling_ragged import RaggedConfig
from nuteprune.runs.log import quiet_libraries

DECODED, ROUNDS = 32, 5


def main(argv: list[str] | None = None) -> int:
    """Write the files, measure and print a row for each; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_k_m"], help="values of export.gguf")
    parser.add_argument("--text", type=Path, default=Path("models/demo-text/heldout.txt"))
    parser.add_argument("--windows", type=int, default=8, help="read from the start of the text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/quants"))
    args = parser.parse_args(argv)
    quiet_libraries()
    base = json.loads((args.export / RECORD).read_text(encoding="utf-8"))["base"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False, return_tensors="pt")["input_ids"]
    windows = ids[0, : args.windows * args.length].view(-1, args.length)
    sys.stdout.write(f"{len(windows)} windows of {args.length} tokens of {args.text}; tokens/s of one at once and of "
                     f"{DECODED} tokens behind it, {args.threads} threads, medians of {ROUNDS} rounds in turns\n\n"
                     "| model | type | bytes | perplexity | prefill | decode |\n"
                     "|---|---|---:|---:|---:|---:|\n")  # fmt: skip
    for kind, files in write(args, base, tokenizer).items():
        models = [Opened(file, args.length, args.threads) for file in files]
        scores = [model.perplexity(windows) for model in models]
        rounds = [[model.speed(windows[0].tolist()) for model in models] for _ in range(ROUNDS)]
        for number, (path, model) in enumerate(zip((base, args.export), models, strict=True)):
            prefill, decode = (statistics.median(each[number][i] for each in rounds) for i in range(2))
            sys.stdout.write(f"| {path} | {kind} | {model.file.stat().st_size:,} | {scores[number]:.3f} "
                             f"| {prefill:.0f} | {decode:.1f} |\n")  # fmt: skip
            sys.stdout.flush()
            model.close()
    return 0


def write(args: argparse.Namespace, base: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Path]]:
    """The files of the base and of the export, by type."""
    files: dict[str, list[Path]] = {kind: [] for kind in args.types}
    spec = None
    for path in (base, args.export):
        model = AutoModelForCausalLM.from_pretrained(path)
        spec = spec or read_spec(model.config)
        shape = "per_layer" if isinstance(model.config, RaggedConfig) else "uniform"
        architecture = gguf_architecture(spec, shape, model.config)
        for kind in args.types:
            folder = args.out / f"{Path(path).name}-{kind}"
            folder.mkdir(parents=True, exist_ok=True)
            write_quantized(folder, model, tokenizer, architecture, kind)
            files[kind].append(folder / FILE)
    return files


class Opened:
    """A file in llama.cpp.

    Args:
        file: the GGUF.
        length: tokens of a window, and of a prompt.
        threads: of the CPU.
    """

    def __init__(self, file: Path, length: int, threads: int):
        self.lib, self.ffi = llama_cpp()
        lib, ffi = self.lib, self.ffi
        lib.llama_backend_init()
        quiet = ffi.callback("void(int, const char *, void *)", lambda level, text, data: None)
        lib.llama_log_set(ffi.cast("ggml_log_callback", quiet), ffi.NULL)
        self.file, self.length = file, length
        self.model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = length + DECODED, length, length
        options.n_threads = options.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, options)
        self.batch = lib.llama_batch_init(length, 0, 1)
        lib.llama_log_set(ffi.NULL, ffi.NULL)

    def close(self) -> None:
        """Give the memory back."""
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def decode(self, tokens: list[int], start: int, scored: bool) -> float:
        """Compute tokens behind the `start` that are there, with all logits or the last one's; returns the seconds."""
        batch, last = self.batch, len(tokens) - 1
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = scored or i == last
        if not start:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        began = time.perf_counter()
        if self.lib.llama_decode(self.context, batch):
            raise UserError(f"llama.cpp cannot compute {self.file}")
        self.lib.llama_synchronize(self.context)
        return time.perf_counter() - began

    def perplexity(self, windows: Tensor) -> float:
        """exp of the mean loss of the second to the last token of windows [N, T]."""
        size, losses = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model)), []
        for window in windows:
            self.decode(window.tolist(), 0, scored=True)
            rows = self.ffi.buffer(self.lib.llama_get_logits(self.context), 4 * size * self.length)
            logits = torch.from_numpy(np.frombuffer(rows, np.float32).copy()).view(self.length, size)
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], window[1:]))
        return math.exp(float(torch.stack(losses).mean()))

    def speed(self, prompt: list[int]) -> tuple[float, float]:
        """Tokens a second of a prompt, and of `DECODED` tokens behind it, one at a time."""
        prefill = self.decode(prompt, 0, scored=False)
        decoding = sum(self.decode(prompt[:1], len(prompt) + i, scored=False) for i in range(DECODED))
        return len(prompt) / prefill, DECODED / decoding


if __name__ == "__main__":
    sys.exit(main())
