"""What a run leaves on disk: gates, LoRA in peft's format, teachers, and the finished student, as safetensors and JSON.

The base model is never part of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nuteprune.arch import ArchSpec
from nuteprune.config import ASKED_EACH_TIME, Config, load_config, to_dict
from nuteprune.errors import MachineError, first_line
from nuteprune.masks import Gates
from nuteprune.runs.checkpoint import CheckpointError, atomic_directory, read_json, verify, write_atomic
from nuteprune.runs.directories import check_pruned
from nuteprune.runs.fingerprint import fingerprint
from nuteprune.runs.fused import BLOCKS, fuse_lora, patterns, unfuse_lora
from nuteprune.runs.snapshot import Snapshot
from nuteprune.runs.snapshot_files import gate_tensors, load_snapshots, save_snapshots, split_gates
from nuteprune.runs.words import one_line

PEFT_PREFIX = "base_model.model.model.layers"
DAMAGED = (CheckpointError, SafetensorError, OSError, ValueError, LookupError, TypeError)
"""What reading a directory raises that is damaged, or was made by something else."""


def save_gates(path: Path, gates: Gates, scores: Mapping[str, Tensor]) -> None:
    """Write gate values as "gates.KIND" and log-alpha as "scores.KIND" to one safetensors file."""
    save_file(gate_tensors(gates, scores), path)


def load_gates(path: Path) -> tuple[Gates, dict[str, Tensor]]:
    """Read what `save_gates` wrote."""
    return split_gates(load_file(path))


def save_adapter(directory: Path, lora: Mapping[str, tuple[Tensor, Tensor]], config: Config, spec: ArchSpec) -> None:
    """Write LoRA in peft's format: adapter_config.json and adapter_model.safetensors.

    The adapter holds the student's whole update over the *unpruned* base; with the gates of gates.safetensors it is the
    pruned student.
    """
    directory.mkdir(parents=True, exist_ok=True)
    targets: list[str] = list(config.lora.targets)
    found: dict = {}
    if spec.fused and lora:
        lora, found = fuse_lora(lora, spec)
        targets = sorted({key.partition(".")[2] for key in lora})
    tensors = {}
    for key, (a, b) in lora.items():
        for name, tensor in (("lora_A", a), ("lora_B", b)):
            tensors[f"{_peft_key(key)}.{name}.weight"] = tensor.detach().cpu().contiguous()
    metadata = {"format": "pt"} | ({"fused": json.dumps(found)} if found else {})
    save_file(tensors, directory / "adapter_model.safetensors", metadata=metadata)
    from peft import LoraConfig, TaskType  # a quarter of a second, and one rank writes

    rank, alpha = config.lora.rank, config.lora.rank * config.lora.scaling
    LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, bias="none", **patterns(lora, rank, alpha),
        task_type=TaskType.CAUSAL_LM, base_model_name_or_path=config.model.path, inference_mode=True,
    ).save_pretrained(directory)  # fmt: skip
    # peft keeps the targets as a set, whose order is another in each process.
    file = directory / "adapter_config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["target_modules"] = sorted(facts["target_modules"])
    file.write_text(json.dumps(facts, indent=2, sort_keys=True), encoding="utf-8")


def load_adapter(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA pairs by "layer.projection" from a peft adapter directory."""
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        found = json.loads((opened.metadata() or {}).get("fused", "{}"))
    pairs = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            layer, _, name = stem.removeprefix(PEFT_PREFIX + ".").split(".")
            pairs[f"{layer}.{name}"] = (tensors[key], tensors[f"{stem}.lora_B.weight"])
    return unfuse_lora(pairs, found)


def _peft_key(key: str) -> str:
    layer, name = key.split(".")
    block = "mlp" if any(name in names for names in BLOCKS) else "self_attn"
    return f"{PEFT_PREFIX}.{layer}.{block}.{name}"


@dataclass(frozen=True)
class Run:
    """What a finished prune stage left behind.

    Attributes:
        directory: the run directory.
        config: its resolved configuration.
        gates, scores: the final student's gates and log-alpha.
        lora: its LoRA pairs.
        snapshots: the teacher bank, by rising sparsity.
        sparsity: the student's sparsity.
        facts: what pruned.json records: steps, tokens, `base` (fingerprint of the base model), …
    """

    directory: Path
    config: Config
    gates: Gates
    scores: dict[str, Tensor]
    lora: dict[str, tuple[Tensor, Tensor]]
    snapshots: list[Snapshot]
    sparsity: float
    facts: dict


def save_run(
    directory: Path, config: Config, spec: ArchSpec, gates: Gates, scores: Mapping[str, Tensor],
    lora: Mapping[str, tuple[Tensor, Tensor]], snapshots: list[Snapshot], facts: dict[str, Any],
    lender: Path | None = None, rungs: Path | None = None,
) -> Path:  # fmt: skip
    """Write the finished student to `<run>/pruned`, atomically.

    `facts` (steps, sparsity, …) go to pruned.json; `lender` and `rungs`: see `save_snapshots`.
    """
    target = directory / "pruned"
    with atomic_directory(target, lender) as tmp:
        save_config(tmp / "config.yaml", config)
        save_gates(tmp / "gates.safetensors", gates, scores)
        save_adapter(tmp / "adapter", lora, config, spec)
        save_snapshots(tmp, snapshots, lender, rungs)
        facts = {**facts, "architecture": spec.__dict__, "base": fingerprint(config.model.path)}
        (tmp / "pruned.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return target


def load_run(directory: str | Path) -> Run:
    """Read a finished prune stage; raises `UserError` (one line) where it is missing, unfinished or damaged."""
    pruned = check_pruned(directory)
    try:
        verify(pruned)
        gates, scores = load_gates(pruned / "gates.safetensors")
        facts = read_json(pruned / "pruned.json")
        return Run(
            Path(directory), load_config(pruned / "config.yaml"), gates, scores, load_adapter(pruned / "adapter"),
            load_snapshots(pruned), facts["sparsity"], facts,
        )  # fmt: skip
    except DAMAGED as error:
        raise MachineError(f"the finished run in {pruned} is damaged: {first_line(error)}") from None


def save_config(path: Path, config: Config) -> None:
    """Write the resolved configuration as YAML; read back anywhere it gives the same values.

    Except those of `ASKED_EACH_TIME`, which no file can set.
    """
    tree = {**to_dict(config), "recipe": "default"}
    for section, field in ASKED_EACH_TIME:
        del tree[section][field]
    settings = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    write_atomic(path, f"# every field, from recipe {one_line(config.recipe)}\n{settings}".encode())
