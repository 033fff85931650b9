"""Prune a model, fine-tune it on instruction records, write it for llama.cpp:

    python examples/finetune_to_gguf.py MODEL TEXT RECORDS [key.sub=value …]

RECORDS is a .json, .jsonl or .parquet file with instruction, input, output; or messages; or prompt, completion.
"""

import sys

import nuteprune

model, text, records, *settings = sys.argv[1:]
run = {
    "run_dir": "runs/finetune-to-gguf",
    "model": {"path": model},
    "data": {"source": text},
    "sparsity": {"target": 0.3},
    "train": {"steps": 500},
    "finetune": {"data": records},
    "export": {"gguf": "q8_0"},
}
nuteprune.prune(run, settings)
nuteprune.finetune(run, settings)
print(f"llama-cli -m {nuteprune.export(run, settings) / 'model.gguf'}")
