"""Bytes and perplexity in llama.cpp of an export and its base in several types: `make bench-quants EXPORT=DIR`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nuteprune.arch import read_spec
from nuteprune.errors import UserError
from nuteprune.exporting.card import RECORD
from nuteprune.exporting.gguf_model import FILE, gguf_architecture
from nuteprune.exporting.gguf_quants import llama_cpp, write_quantized
from nuteprune.exporting.modeling_ragged import RaggedConfig
from nuteprune.runs.log import quiet_libraries


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
    sys.stdout.write(f"{len(windows)} windows of {args.length} tokens of {args.text}\n\n"
                     "| model | type | bytes | perplexity |\n|---|---|---:|---:|\n")  # fmt: skip
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
            file = folder / FILE
            found = perplexity(file, windows, args.threads)
            sys.stdout.write(f"| {path} | {kind} | {file.stat().st_size:,} | {found:.3f} |\n")
            sys.stdout.flush()
    return 0


def perplexity(file: Path, windows: Tensor, threads: int) -> float:
    """exp of the mean loss of the second to the last token of windows [N, T], in llama.cpp."""
    lib, ffi = llama_cpp()
    lib.llama_backend_init()
    quiet = ffi.callback("void(int, const char *, void *)", lambda level, text, data: None)
    lib.llama_log_set(ffi.cast("ggml_log_callback", quiet), ffi.NULL)
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    length = windows.shape[1]
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = length
    options.n_threads = options.n_threads_batch = threads
    context = lib.llama_init_from_model(model, options)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(length, 0, 1)
    batch.n_tokens = length
    losses = []
    for window in windows.tolist():
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        if lib.llama_decode(context, batch):
            raise UserError(f"llama.cpp cannot compute {file}")
        rows = np.frombuffer(ffi.buffer(lib.llama_get_logits(context), 4 * size * length), np.float32)
        logits = torch.from_numpy(rows.copy()).view(length, size)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(window[1:])))
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    lib.llama_log_set(ffi.NULL, ffi.NULL)
    return math.exp(float(torch.stack(losses).mean()))


if __name__ == "__main__":
    sys.exit(main())
