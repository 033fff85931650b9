"""Runs exported models in llama.cpp and holds them against transformers: `make check-llamacpp EXPORT=DIR`.

Arguments: llama.cpp's own convert_hf_to_gguf.py, and directories. Each is converted to GGUF in float32; the logits of a
prompt of random tokens (with a float32 KV cache) and the tokenizer's pieces of a text are compared.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import llama_cpp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = 64
TEXT = "The capital of France is Paris;\n    for i in range(3): print(i)"


def compare(converter, directory, gguf):
    """Largest difference of a logit over the largest logit, and whether the tokenizers agree."""
    command = [sys.executable, converter, directory, "--outtype", "f32", "--outfile", gguf]
    converted = subprocess.run(command, capture_output=True, text=True)
    if converted.returncode:
        sys.exit(converted.stderr)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.randint(3, model.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
    engine = llama_cpp.Llama(str(gguf), n_ctx=PROMPT, logits_all=True, verbose=False,
                             type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)  # fmt: skip
    engine.eval(ids.tolist())
    apart = (torch.from_numpy(engine.scores[:PROMPT].copy()) - wanted).abs().max() / wanted.abs().max()
    pieces = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
    return type(model).__name__, float(apart), engine.tokenize(TEXT.encode(), add_bos=False) == pieces


def main():
    converter, *directories = sys.argv[1:]
    sys.stdout.write(f"llama-cpp-python {llama_cpp.__version__}\n")
    for directory in directories:
        with tempfile.TemporaryDirectory() as folder:
            name, apart, same = compare(converter, directory, Path(folder) / "model.gguf")
        sys.stdout.write(f"{directory} {name}: logits of {PROMPT} tokens within {apart:.1e} of the largest, "
                         f"tokenizers {'agree' if same else 'differ'}\n")  # fmt: skip
        sys.stdout.flush()
        if apart > 1e-3 or not same:
            sys.exit("llama.cpp computes something else")


if __name__ == "__main__":
    main()
