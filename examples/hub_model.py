"""Prune a model of the hub by 30% and let it write: python examples/hub_model.py [MODEL] [key.sub=value …]"""

import sys

from transformers import pipeline

import nuteprune

model, *settings = sys.argv[1:] or ["HuggingFaceTB/SmolLM2-135M"]
run = {"run_dir": "runs/hub-model", "model": {"path": model}, "sparsity": {"target": 0.3}, "train": {"steps": 500}}
nuteprune.prune(run, settings)
small = nuteprune.export(run, settings)
write = pipeline("text-generation", model=str(small), trust_remote_code=True)
print(write("The river", max_new_tokens=20, do_sample=False)[0]["generated_text"])
