"""Serves exported models with vLLM and holds them against transformers: `make check-vllm EXPORT=DIR`.

Runs in an environment of its own, without this project. For each directory, in float32: the log-probabilities of a
prompt of random tokens, and how far those of the greedy tokens after it are from the best in transformers' eyes.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
               "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # fmt: skip

import torch
import transformers
import vllm

PROMPT, NEW = 64, 12
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Those that exports are promised to be served of, in the shapes of docs/engines.md."""


def compare(directory):
    """Largest differences of a log-probability: of the prompt's tokens, and of vLLM's greedy ones from the best."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True)
    model.eval()
    ids = torch.randint(3, model.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0))
    engine = vllm.LLM(model=directory, dtype="float32", max_model_len=PROMPT + NEW, gpu_memory_utilization=0.3,
                      enforce_eager=True, disable_log_stats=True,
                      trust_remote_code="DeciLMForCausalLM" in model.config.architectures)  # fmt: skip
    how = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, prompt_logprobs=0)
    (result,) = engine.generate([{"prompt_token_ids": ids.tolist()}], how)
    written = torch.cat((ids, torch.tensor(result.outputs[0].token_ids)))
    with torch.no_grad():
        scores = model(written[None]).logits[0, :-1].log_softmax(-1)
    wanted = scores.gather(1, written[1:, None])[:, 0]
    got = torch.tensor(
        [row[int(token)].logprob for row, token in zip(result.prompt_logprobs[1:], ids[1:], strict=True)]
    )
    prompt = (got - wanted[: PROMPT - 1]).abs().max()
    greedy = (scores.max(-1).values - wanted)[PROMPT - 1 :].max()
    return type(model).__name__, float(prompt), float(greedy)


def main():
    sys.stdout.write(f"vllm {vllm.__version__}, transformers {transformers.__version__}\n")
    for directory in sys.argv[1:]:
        kind = json.loads((Path(directory) / "config.json").read_text())["model_type"].removeprefix("nuteprune_")
        if kind not in FAMILIES:
            sys.stdout.write(f"{directory}: {kind} is not compared\n")
            continue
        name, prompt, greedy = compare(directory)
        sys.stdout.write(f"{directory} {name}: log-probabilities of {PROMPT - 1} tokens within {prompt:.1e}, "
                         f"{NEW} greedy tokens within {greedy:.1e} of the best\n")  # fmt: skip
        sys.stdout.flush()
        if max(prompt, greedy) > 1e-3:
            sys.exit("vLLM computes something else")


if __name__ == "__main__":
    main()
