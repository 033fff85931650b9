"""Chooses how a run is laid out on a cluster so that it fits, and writes the settings for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from nuteprune.arch import ArchSpec, read_spec
from nuteprune.config import Config, ConfigError, load_config, to_dict
from nuteprune.masks import check_target
from nuteprune.model.loading import read_config
from nuteprune.planning.costs import Timing, Traffic, extra_steps, mean_kept, timing, total_steps, traffic
from nuteprune.planning.footprint import (
    USABLE,
    Cluster,
    Job,
    Layout,
    Memory,
    memory,
)

_LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "dtype": "bfloat16"}
MODELS = {
    "llama-7b": _LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                          "intermediate_size": 11008, "vocab_size": 32000},
    "llama-13b": _LLAMA | {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
                           "intermediate_size": 13824, "vocab_size": 32000},
    "llama-3.1-8b": _LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                              "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
    "llama-3.1-70b": _LLAMA | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
                               "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256},
    "qwen3-32b": _LLAMA | {"model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 64,
                           "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
                           "intermediate_size": 25600, "vocab_size": 151936},
    "mistral-7b": _LLAMA | {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32,
                            "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
                            "vocab_size": 32768, "sliding_window": None},
    "qwen3-14b": _LLAMA | {"model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 40,
                           "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
                           "intermediate_size": 17408, "vocab_size": 151936},
    "granite-3.3-8b": _LLAMA | {"model_type": "granite", "hidden_size": 4096, "num_hidden_layers": 40,
                                "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12800,
                                "vocab_size": 49159, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
                                "residual_multiplier": 0.22, "attention_multiplier": 0.0078125,
                                "logits_scaling": 16.0},
    "smollm3-3b": _LLAMA | {"model_type": "smollm3", "hidden_size": 2048, "num_hidden_layers": 36,
                            "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 11008,
                            "vocab_size": 128256, "tie_word_embeddings": True},
    "phi-4": _LLAMA | {"model_type": "phi3", "hidden_size": 5120, "num_hidden_layers": 40,
                       "num_attention_heads": 40, "num_key_value_heads": 10, "intermediate_size": 17920,
                       "vocab_size": 100352, "pad_token_id": None},
    "olmo-2-7b": _LLAMA | {"model_type": "olmo2", "hidden_size": 4096, "num_hidden_layers": 32,
                           "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 100352},
    "gemma-3-1b": _LLAMA | {"model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26,
                            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
                            "intermediate_size": 6912, "vocab_size": 262144, "tie_word_embeddings": True,
                            "sliding_window": 512},
    "olmo-3-7b": _LLAMA | {"model_type": "olmo3", "hidden_size": 4096, "num_hidden_layers": 32,
                           "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 100278},
    "qwen3-30b-a3b": _LLAMA | {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
                               "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
                               "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
                               "norm_topk_prob": True, "vocab_size": 151936},
    "mixtral-8x7b": _LLAMA | {"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32,
                              "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
                              "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000},
}  # fmt: skip
"""Sizes of public models, by the name `--model` takes: enough of their config.json to plan without it, in bfloat16."""
HUB = {
    "huggyllama/llama-7b": "llama-7b",
    "huggyllama/llama-13b": "llama-13b",
    "meta-llama/Llama-2-7b-hf": "llama-7b",
    "meta-llama/Llama-2-13b-hf": "llama-13b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "mistralai/Mistral-7B-v0.3": "mistral-7b",
    "Qwen/Qwen3-14B": "qwen3-14b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "ibm-granite/granite-3.3-8b-instruct": "granite-3.3-8b",
    "HuggingFaceTB/SmolLM3-3B-Base": "smollm3-3b",
    "HuggingFaceTB/SmolLM3-3B": "smollm3-3b",
    "microsoft/phi-4": "phi-4",
    "allenai/OLMo-2-1124-7B": "olmo-2-7b",
    "google/gemma-3-1b-pt": "gemma-3-1b",
    "google/gemma-3-1b-it": "gemma-3-1b",
    "allenai/Olmo-3-1025-7B": "olmo-3-7b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen/Qwen3-30B-A3B-Base": "qwen3-30b-a3b",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral-8x7b",
}
"""Hub ids of those sizes, which are known without asking the hub (some of them it tells to licensees only)."""

_UNITS = {
    "bytes": (r"B", "80GB or 80GiB"),
    "rate": (r"B/s", "450GB/s"),
    "flops": (r"FLOP/s|FLOPS", "990TFLOP/s"),
}
_PREFIXES = {"": 1.0} | {p: 1e3 ** (i + 1) for i, p in enumerate("KMGTP")}
_PREFIXES |= {f"{p}i": 1024.0 ** (i + 1) for i, p in enumerate("KMGTP")}


def quantity(flag: str, text: str, kind: str) -> float:
    """The number behind a flag's value such as "80GB", "450GB/s" or "990TFLOP/s", in bytes, bytes/s or FLOP/s.

    Raises:
        ConfigError: no number, an unknown unit, or nothing above zero.
    """
    unit, example = _UNITS[kind]
    match = re.fullmatch(r"\s*([0-9.eE+-]*[0-9.])\s*([A-Za-z/]*)\s*", text)
    digits, suffix = match.groups() if match else ("", "")
    try:
        number = float(digits)
    except ValueError:
        raise ConfigError(f"{flag} '{text}': not a number with a unit; write it like {example}") from None
    prefix = re.fullmatch(rf"((?:[KMGTP]i?)?)(?:{unit})", suffix)
    if prefix is None:
        raise ConfigError(f"{flag} '{text}': unknown unit '{suffix}'; write it like {example}")
    if number <= 0:
        raise ConfigError(f"{flag} '{text}': must be greater than 0")
    return number * _PREFIXES[prefix[1]]


def named_spec(name: str) -> ArchSpec:
    """The architecture of a model in `MODELS`."""
    return read_spec(named_config(name))


def named_config(name: str) -> object:
    """transformers' configuration of a model in `MODELS`."""
    sizes = dict(MODELS[name])
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes)


def read_model(model: str) -> tuple[object, ArchSpec]:
    """Configuration and architecture of a directory, a config.json, a hub id or a name of `planner.MODELS`.

    Only a hub id (`name` or `owner/name` that is no path here) that is not in `HUB` is looked up on the network.
    """
    if not model:
        raise ConfigError(
            f"--model is missing: give a directory, a config.json, a hub id or one of {', '.join(MODELS)}"
        )
    path = Path(model)
    name = model.lower() if path.exists() else HUB.get(model, model.lower())
    if name in MODELS:
        config = named_config(name)
        return config, read_spec(config)
    if not path.exists() and (path.suffix == ".json" or model.startswith((".", "/", "~")) or len(path.parts) > 2):
        raise ConfigError(f"--model {model}: there is no such file or directory")
    return read_config(model)


@dataclass(frozen=True)
class Estimate:
    """A layout with its figures."""

    layout: Layout
    memory: Memory
    traffic: Traffic
    timing: Timing
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What the planner found.

    Attributes:
        job: the run.
        steps: optimizer steps of the run.
        kept: mean kept share of student and teacher.
        tried: estimates in order of preference, up to and with the chosen one (all of them where none fits).
        chosen: the first that fits, with hpZ where that is faster; where none fits, the smallest.
        fastest: the fastest of all layouts that fit, where it is not the chosen one.
    """

    job: Job
    steps: int
    kept: tuple[float, float]
    tried: list[Estimate]
    chosen: Estimate
    fastest: Estimate | None = None

    @property
    def hours(self) -> float:
        """Wall-clock hours of the run: its steps, the importance of units and the measuring of structures."""
        return self.chosen.timing.step * (self.steps + extra_steps(self.job.config)) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.job.cluster.ranks


def make_plan(job: Job, tokens_per_document: float, zero: str = "auto") -> Plan:
    """Lay the run out: the first layout of `candidates` that fits, then hpZ if that fits as well and is faster.

    Args:
        job: the run.
        tokens_per_document: assumed, for runs that are given in epochs.
        zero: "2" or "3", or "auto": ZeRO-2 if the run fits under it unchanged (no weight is ever gathered), else 3.

    Raises:
        ConfigError: the ranks do not divide the batch, the target is out of reach, or the steps cannot be counted.
    """
    check_target(job.spec, job.config.gates, job.config.sparsity.target, job.config.lora.targets)
    steps = total_steps(job.config, tokens_per_document)
    kept = mean_kept(job, steps)
    options = [estimate(job, layout, steps, kept) for layout in candidates(job, zero)]
    first = next((i for i, option in enumerate(options) if option.fits), None)
    if first is None:
        return Plan(job, steps, kept, options, min(options, key=lambda option: option.memory.peak))
    chosen = _with_hpz(job, options[first], steps, kept)
    rest = [_with_hpz(job, option, steps, kept) for option in options[first:] if option.fits]
    fastest = min([chosen, *rest], key=lambda option: option.timing.step)
    return Plan(job, steps, kept, options[: first + 1], chosen, None if fastest is chosen else fastest)


def candidates(job: Job, zero: str) -> Iterator[Layout]:
    """Layouts in order of preference: as configured, offload, smaller micro-batches, activation checkpointing.

    Offload comes first because under ZeRO-3 each rank reads only its shard from the host, while a smaller micro-batch
    gathers all weights more often and checkpointing computes a forward pass more. hpZ is no way to save memory (it
    takes some, for less traffic between nodes): see `make_plan`.
    """
    train = job.config.train
    full = min(train.micro_batch or job.local_batch, job.local_batch)
    if zero == "auto":
        yield Layout(2, full, train.activation_checkpointing)
    stage = 2 if zero == "2" else 3
    sizes = [full]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    for checkpointing in sorted({train.activation_checkpointing, True}):
        for micro_batch in sizes:
            for offload in (False, True)[: stage - 1]:
                yield Layout(stage, micro_batch, checkpointing, offload)


def estimate(job: Job, layout: Layout, steps: int, kept: tuple[float, float]) -> Estimate:
    """All figures of one layout."""
    need = memory(job, layout, steps)
    fits = need.peak <= USABLE * job.cluster.gpu_memory
    return Estimate(layout, need, traffic(job, layout), timing(job, layout, kept), fits)


def _with_hpz(job: Job, option: Estimate, steps: int, kept: tuple[float, float]) -> Estimate:
    """The same with hpZ, where there is more than one node of more than one GPU, it fits and the step is faster."""
    layout, cluster = option.layout, job.cluster
    if layout.stage != 3 or layout.offload or cluster.nodes == 1 or cluster.gpus_per_node == 1:
        return option
    other = estimate(job, replace(layout, hpz=True), steps, kept)
    gain = (other.timing.step, other.timing.serial) < (option.timing.step, option.timing.serial)
    return other if other.fits and gain else option


def run_settings(plan: Plan, deepspeed: str = "") -> dict:
    """The run's YAML as a nested dict: what differs from its recipe, with the chosen layout filled in.

    Args:
        plan: the plan.
        deepspeed: path of the DeepSpeed file.
    """
    layout, config = plan.chosen.layout, plan.job.config
    train = replace(config.train, micro_batch=layout.micro_batch, activation_checkpointing=layout.checkpointing)
    tree = to_dict(replace(config, train=train))
    if deepspeed:
        tree["deepspeed"] = deepspeed
    return {"recipe": config.recipe} | _difference(tree, to_dict(load_config(None, [f"recipe={config.recipe}"])))


def _difference(tree: dict, base: dict) -> dict:
    changed = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            inner = _difference(value, base[key])
            if inner:
                changed[key] = inner
        elif value != base[key]:
            changed[key] = value
    return changed


def deepspeed_settings(plan: Plan) -> dict:
    """The DeepSpeed configuration of the chosen layout: what a run does not fill in itself (zero.py)."""
    layout = plan.chosen.layout
    zero: dict = {"stage": layout.stage}
    if layout.stage == 3:
        zero["overlap_comm"] = True
    if layout.offload:
        zero["offload_param"] = {"device": "cpu"}
    if layout.hpz:
        zero["zero_hpz_partition_size"] = plan.job.cluster.gpus_per_node
    return {"zero_optimization": zero}


def table(base: Config, cluster: Cluster, tokens_per_document: float, zero: str = "auto") -> list[tuple[str, Plan]]:
    """A plan for each of `MODELS` on one cluster in bfloat16; the batch is rounded up to a multiple of the ranks.

    Mixtures of experts in the uniform shape with LoRA on what can have it, as they are pruned.
    """
    ranks = cluster.ranks
    batch = -(-base.train.batch_size // ranks) * ranks
    rows = []
    for name in MODELS:
        model, train = replace(base.model, path=name, dtype="bfloat16"), replace(base.train, batch_size=batch)
        spec, gates = named_spec(name), base.gates
        if spec.experts > 1:
            gates = replace(gates, shape="uniform", units=["kv_groups", "experts", "ffn"])
        lora = replace(base.lora, targets=[target for target in base.lora.targets if target in spec.lora_targets])
        job = Job(spec, replace(base, model=model, train=train, gates=gates, lora=lora), cluster)
        rows.append((name, make_plan(job, tokens_per_document, zero)))
    return rows
