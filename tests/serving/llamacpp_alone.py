"""Runs exported GGUF files in llama.cpp and holds them against transformers: `make check-llamacpp EXPORT=DIR`.

Arguments: directories of exports with `model.gguf` in float32 (`nuteprune export RUN --gguf f32`), which lie beside the
same model for transformers. The logits of a prompt of random tokens (with a float32 KV cache), the greedy tokens after
it, and the tokenizer's pieces of a text are compared. Takes llama-cpp-python, or llama-cpp-py-sync (a built wheel).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT, NEW = 64, 12
THREADS = 1  # more of them wait for each other on a busy machine
TEXT = (
    "The capital of France is Paris;\n    for i in range(3): print(i)\n\n\n\t'tis 2024, she'll pay 1,234.5 € — "
    "naïve café 北京"
)
TOLERANCE = 1e-3


class TableGelu(torch.nn.Module):
    """Gemma's GELU as llama.cpp has it on a CPU, in float32 models too: from -10 to 10 looked up by the value's float16
    in a table of float16 (`ggml_vec_geglu_f32` of ggml-cpu/vec.h)."""

    def forward(self, x):
        looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, looked_up, x.relu())


class LlamaCpp:
    """One model in llama.cpp through its C interface, of whichever binding is installed.

    Without a context it is the file's vocabulary alone, of a file that may hold nothing else.
    """

    def __init__(self, path, context=0):
        try:
            import llama_cpp
        except ImportError:
            llama_cpp = None
        if llama_cpp is not None:
            self.name = f"llama-cpp-python {llama_cpp.__version__}"
            f32 = llama_cpp.GGML_TYPE_F32
            self._model = llama_cpp.Llama(path, vocab_only=not context, n_ctx=context, logits_all=True, verbose=False,
                                           type_k=f32, type_v=f32, n_threads=THREADS,
                                           n_threads_batch=THREADS)  # fmt: skip
            self.train_context = llama_cpp.llama_model_n_ctx_train(self._model.model)
            self.logits, self.tokenize = self._python_logits, self._python_tokens
            return
        import llama_cpp_py_sync as sync
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.name = f"llama-cpp-py-sync {sync.__version__}"
        self.ffi, self.lib = get_ffi(), get_lib()
        ffi, lib = self.ffi, self.lib
        self._quiet = ffi.callback("void(int, const char *, void *)", lambda level, text, data: None)
        lib.llama_log_set(ffi.cast("ggml_log_callback", self._quiet), ffi.NULL)
        lib.llama_backend_init()
        options = lib.llama_model_default_params()
        options.vocab_only = not context
        self._file = lib.llama_model_load_from_file(path.encode(), options)
        if self._file == ffi.NULL:
            sys.exit(f"{path}: llama.cpp does not load it")
        self._vocab = lib.llama_model_get_vocab(self._file)
        self.logits, self.tokenize = self._sync_logits, self._sync_tokens
        if not context:
            return
        options = lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.type_k = options.type_v = 0  # GGML_TYPE_F32
        options.flash_attn_type = 0  # it computes in float16
        options.n_threads = options.n_threads_batch = THREADS
        self._context = lib.llama_init_from_model(self._file, options)
        self.train_context = lib.llama_model_n_ctx_train(self._file)

    def _python_logits(self, ids):
        self._model.reset()
        self._model.eval(ids)
        return torch.from_numpy(self._model.scores[: len(ids)].copy())

    def _python_tokens(self, text):
        return self._model.tokenize(text.encode(), add_bos=True)

    def _sync_logits(self, ids):
        ffi, lib = self.ffi, self.lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        if lib.llama_decode(self._context, batch):
            sys.exit("llama.cpp cannot decode the prompt")
        size = lib.llama_vocab_n_tokens(self._vocab)
        rows = [
            np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(self._context, i), 4 * size), np.float32)
            for i in range(len(ids))
        ]
        logits = torch.from_numpy(np.stack(rows))
        lib.llama_batch_free(batch)
        return logits

    def _sync_tokens(self, text):
        data = text.encode()
        found = self.ffi.new("llama_token[]", len(data) + 8)
        count = self.lib.llama_tokenize(self._vocab, data, len(data), found, len(data) + 8, True, False)
        return list(found[0:count])


def compare(directory):
    """Largest difference of a logit over the largest logit, and whether greedy tokens and tokenizers agree."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()
    if type(model).__name__.startswith("Gemma"):
        for layer in model.model.layers:
            layer.mlp.act_fn = TableGelu()
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    engine = LlamaCpp(f"{directory}/model.gguf", PROMPT + NEW)
    length = min(PROMPT, engine.train_context - NEW)  # it may end with a sliding window
    ids = torch.randint(3, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
    got = engine.logits(ids)
    apart = float((got - wanted).abs().max() / wanted.abs().max())
    written = list(ids)
    for _ in range(NEW):
        written.append(int(engine.logits(written)[-1].argmax()))
    with torch.no_grad():
        scores = model(torch.tensor([written])).logits[0, length - 1 : -1].log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(written[length:])[:, None])[:, 0]
    greedy = float((scores.max(-1).values - chosen).max())
    pieces = tokenizer(TEXT)["input_ids"]  # with what the tokenizer puts first, if anything
    return engine.name, type(model).__name__, length, apart, greedy, engine.tokenize(TEXT) == pieces


def main():
    for directory in sys.argv[1:]:
        if not (Path(directory) / "model.gguf").exists():
            sys.stdout.write(f"{directory}: no model.gguf\n")
            continue
        engine, name, length, apart, greedy, same = compare(directory)
        sys.stdout.write(f"{directory} {name}, {engine}: logits of {length} tokens within {apart:.1e} of the largest, "
                         f"{NEW} greedy tokens within {greedy:.1e} of the best, tokenizers "
                         f"{'agree' if same else 'differ'}\n")  # fmt: skip
        sys.stdout.flush()
        if not (apart <= TOLERANCE and greedy <= TOLERANCE and same):
            sys.exit("llama.cpp computes something else")


if __name__ == "__main__":
    main()
