"""Serves exported models with vLLM and holds them against transformers: `make check-vllm EXPORT=DIR`.

Runs in an environment of its own. For each directory, in float32: the log-probabilities of a prompt of random tokens,
and how far those of the greedy tokens after it are from the best in transformers' eyes. `--impl transformers` takes
vLLM's transformers backend and nothing of this project, `--impl auto` what vLLM chooses, with this project's plugin.
`--tp 2` splits the model over that many processes, each on a core of its own.
"""

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

import torch
import transformers

PROMPT, NEW = 64, 12
TOLERANCE = 1e-3


def wanted(directory, written):
    """The class in transformers, and its log-probabilities [T - 1, V] of what follows each of T tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad():
        scores = model.eval()(torch.tensor([written])).logits[0, :-1].log_softmax(-1)
    return type(model).__name__, scores.numpy()


def settings():
    """Of the command line; vLLM reads its own from the environment when it is imported."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--impl", choices=("auto", "transformers"), default="transformers")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("exports", nargs="+")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(args.tp > 1))
    if args.tp > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(args.tp)))
    if args.impl == "transformers":
        os.environ["VLLM_PLUGINS"] = ""  # none
    return args


def compare(directory, config, args, reference):
    """Largest differences of a log-probability: of the prompt's tokens, and of vLLM's greedy ones from the best.

    `reference` is a process of its own: vLLM changes the classes of transformers that it serves with.
    """
    import vllm
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    own = set(vllm.ModelRegistry.get_supported_archs()) - {"DeciLMForCausalLM"}
    trust = args.impl == "transformers" or not own & set(config["architectures"])

    ids = torch.randint(3, config["vocab_size"], (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    engine = vllm.LLM(model=directory, dtype="float32", max_model_len=PROMPT + NEW, gpu_memory_utilization=0.3,
                      enforce_eager=True, disable_log_stats=True, model_impl=args.impl, tensor_parallel_size=args.tp,
                      trust_remote_code=trust)  # fmt: skip
    how = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, prompt_logprobs=0)
    (result,) = engine.generate([{"prompt_token_ids": ids}], how)
    written = [*ids, *result.outputs[0].token_ids]
    name, scores = reference.submit(wanted, directory, written).result()
    best = torch.from_numpy(scores)
    chosen = best.gather(1, torch.tensor(written[1:])[:, None])[:, 0]
    got = torch.tensor([row[token].logprob for row, token in zip(result.prompt_logprobs[1:], ids[1:], strict=True)])
    prompt = (got - chosen[: PROMPT - 1]).abs().max()
    greedy = (best.max(-1).values - chosen)[PROMPT - 1 :].max()
    assert args.impl == "auto" or "nuteprune" not in sys.modules
    return name, float(prompt), float(greedy)


def main():
    args = settings()
    import vllm

    sys.stdout.write(f"vllm {vllm.__version__}, transformers {transformers.__version__}, --model-impl {args.impl}, "
                     f"tensor parallel {args.tp}\n")  # fmt: skip
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as reference:
        for directory in args.exports:
            config = json.loads((Path(directory) / "config.json").read_text())
            if args.impl == "transformers" and "auto_map" not in config:
                continue  # a stock class, which vLLM has its own of
            name, prompt, greedy = compare(directory, config, args, reference)
            sys.stdout.write(f"{directory} {name}: log-probabilities of {PROMPT - 1} tokens within {prompt:.1e}, "
                             f"{NEW} greedy tokens within {greedy:.1e} of the best\n")  # fmt: skip
            sys.stdout.flush()
            if not (prompt <= TOLERANCE and greedy <= TOLERANCE):
                sys.exit("vLLM computes something else")


if __name__ == "__main__":
    main()
