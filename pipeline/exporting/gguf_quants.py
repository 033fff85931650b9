"""K-quants of model.gguf, by llama.cpp's own quantizer out of the wheel `llama-cpp-py-sync`.

They come in blocks of 256 values of a row. What rows of another length become, and which matrices get more bits than
the others, is llama.cpp's choice (`src/llama-quant.cpp`).
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import gguf
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.errors import UserError
from nuteprune.exporting.gguf_model import FILE, TYPES, write_gguf

log = logging.getLogger(__name__)

K_QUANTS = {kind: gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"] for kind in ("q3_k_m", "q4_k_m", "q5_k_m", "q6_k")}
"""llama.cpp's number of each, by the values of export.gguf."""
PACKAGE = "llama-cpp-py-sync"
BLOCK = gguf.QK_K
_ERROR = 4


def llama_cpp():
    """llama.cpp's library and the `cffi` that speaks to it; raises UserError where it is not installed."""
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        return get_lib(), get_ffi()
    except (ImportError, OSError) as error:
        raise UserError(f"export.gguf: llama.cpp makes K-quants, and is not there ({error}): pip install {PACKAGE}, "
                          "or use export.gguf=q8_0") from None  # fmt: skip


def check_quantizer(kind: str) -> None:
    """UserError where `kind` of export.gguf needs a llama.cpp that is not installed."""
    if kind in K_QUANTS:
        llama_cpp()


def write_quantized(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, architecture: str, kind: str
) -> None:
    """`write_gguf` for every value of export.gguf; K-quants are made of a file in 16 or 32 bits, which goes again."""
    if kind in TYPES:
        write_gguf(directory, model, tokenizer, architecture, kind)
        return
    write_gguf(directory, model, tokenizer, architecture, "f32" if model.dtype == torch.float32 else "f16")
    whole = (directory / FILE).rename(directory / f"whole-{FILE}")
    _quantize(whole, directory / FILE, K_QUANTS[kind])
    whole.unlink()
    _say_what_fell_back(directory / FILE, kind)


def _quantize(whole: Path, into: Path, file_type: int) -> None:
    lib, ffi = llama_cpp()
    lib.llama_backend_init()
    errors: list[str] = []

    @ffi.callback("void(int, const char *, void *)")
    def hear(level, text, _):
        if level == _ERROR:
            errors.append(ffi.string(text).decode(errors="replace").strip())

    lib.llama_log_set(ffi.cast("ggml_log_callback", hear), ffi.NULL)
    options = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    options.ftype = file_type
    try:
        failed = lib.llama_model_quantize(str(whole).encode(), str(into).encode(), options)
    finally:
        lib.llama_log_set(ffi.NULL, ffi.NULL)
    if failed:
        raise UserError(f"llama.cpp cannot quantize this model ({' '.join(errors)}): use export.gguf=q8_0")


def _say_what_fell_back(file: Path, kind: str) -> None:
    matrices = [tensor for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1]
    other = Counter(t.tensor_type.name.lower() for t in matrices if t.shape[0] % BLOCK)
    stored = f", stored as {', '.join(f'{name} ({count})' for name, count in other.most_common())}" if other else ""
    log.info("%s: %s by llama.cpp; of %d matrices %d have rows that are no multiple of %d%s", FILE, kind, len(matrices),
             other.total(), BLOCK, stored)  # fmt: skip
