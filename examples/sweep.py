"""Prune a model to several sparsities and draw what each costs: python examples/sweep.py MODEL TEXT [key.sub=value …]

Each sparsity has a run of its own below runs/sweep; started again, the sweep goes on where it stopped.
"""

import sys

import matplotlib.pyplot as plt

import nuteprune

SPARSITIES = (0.1, 0.3, 0.5)

model, text, *settings = sys.argv[1:]
left, perplexity = [], []
for sparsity in SPARSITIES:
    run = {
        "run_dir": f"runs/sweep/{sparsity}",
        "model": {"path": model},
        "data": {"source": text},
        "sparsity": {"target": sparsity},
        "train": {"steps": 500},
        "evaluate": {"batch_sizes": [], "prompts": 0},
    }
    nuteprune.prune(run, settings)
    nuteprune.export(run, settings)
    before, after = nuteprune.evaluate(run, settings)["models"]
    for entry in (before, after) if not left else (after,):
        left.append(entry["parameters"] / before["parameters"])
        perplexity += [score["perplexity"] for score in entry["perplexity"].values()]

plt.plot([100 * share for share in left], perplexity, "o-")
plt.xlabel("parameters left (%)")
plt.ylabel("perplexity of the text it was trained on")
plt.savefig("runs/sweep/sweep.png")
print("runs/sweep/sweep.png")
