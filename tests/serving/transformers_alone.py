"""Loads exports under the transformers that is on the path, and generates: `make check-transformers EXPORT=DIR`.

Arguments: a file of reference logits, and directories. The first run writes the file, later ones, under other versions,
are held against it: logits of a prompt of random tokens, and greedy tokens with the cache as without.
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT, NEW, TOLERANCE = 64, 12, 2e-5


def run(directory):
    """Logits [T, V] of a prompt, and greedy tokens after it."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()
    AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    with torch.no_grad():
        logits = model(ids).logits[0]
        cached, plain = (model.generate(ids, use_cache=use, **how) for use in (True, False))
    if not torch.equal(cached, plain):
        sys.exit(f"{directory}: other tokens with the cache than without")
    return logits, cached[0, PROMPT:]


def main():
    file, *directories = sys.argv[1:]
    wanted = torch.load(file) if Path(file).exists() else {}
    for directory in directories:
        logits, tokens = run(directory)
        reference, same = wanted.setdefault(directory, (logits, tokens))
        apart = float((logits - reference).abs().max() / reference.abs().max())
        greedy = "equal" if torch.equal(tokens, same) else "differ"
        sys.stdout.write(f"transformers {transformers.__version__}, {directory}: logits within {apart:.1e} of the "
                         f"largest of the first version, greedy tokens {greedy}\n")  # fmt: skip
        sys.stdout.flush()
        if not apart <= TOLERANCE or not torch.equal(tokens, same):
            sys.exit("this version computes something else")
    torch.save(wanted, file)


if __name__ == "__main__":
    main()
