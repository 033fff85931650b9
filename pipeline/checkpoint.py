"""Directories that are complete or absent: sha256 manifests, atomic renames, and the state of a run on disk.

The base model is never part of it: a run's state is gates, LoRA, teacher bank and optimizer, as safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.arch import PROJECTIONS, ArchSpec
from pipeline.config import Config, ConfigError, load_config, to_dict
from pipeline.masks import KINDS, Gates
from pipeline.teachers import Snapshot

MANIFEST = "manifest.json"
PEFT_PREFIX = "base_model.model.model.layers"


class CheckpointError(Exception):
    """A directory that is incomplete, truncated or altered; the message says which file and how it differs."""


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success write its manifest, flush it to disk and rename it to `target`.

    An existing `target` is replaced only after the new one is complete; on an error nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        write_manifest(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _fsync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(directory: Path) -> None:
    """Write manifest.json: size and sha256 of every file below the directory."""
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (directory / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def verify(directory: Path) -> None:
    """Raise `CheckpointError` unless every file of the manifest is there with its size and sha256."""
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        raise CheckpointError(f"{directory} has no readable {MANIFEST}") from None
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        if sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} does not match its sha256")


def sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(f)


def _sha256(f) -> str:
    digest = hashlib.sha256()
    for block in iter(lambda: f.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the pieces of a run -------------------------------------------------------------------------------------------


def save_gates(path: Path, gates: Gates, scores: Mapping[str, Tensor]) -> None:
    """Write gate values as "gates.KIND" and log-alpha as "scores.KIND" to one safetensors file."""
    tensors = {f"gates.{k}": v for k, v in gates.as_dict().items()}
    tensors |= {f"scores.{k}": v for k, v in scores.items()}
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)


def load_gates(path: Path) -> tuple[Gates, dict[str, Tensor]]:
    """Read what `save_gates` wrote."""
    tensors = load_file(path)
    part = lambda name: {k: tensors[f"{name}.{k}"] for k in KINDS if f"{name}.{k}" in tensors}  # noqa: E731
    return Gates(**part("gates")), part("scores")


def save_adapter(directory: Path, lora: Mapping[str, tuple[Tensor, Tensor]], config: Config) -> None:
    """Write LoRA in peft's format: adapter_config.json and adapter_model.safetensors.

    The adapter holds the student's whole update over the *unpruned* base; with the gates of gates.safetensors it is the
    pruned student.
    """
    from peft import LoraConfig, TaskType

    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key, (a, b) in lora.items():
        for name, tensor in (("lora_A", a), ("lora_B", b)):
            tensors[f"{_peft_key(key)}.{name}.weight"] = tensor.detach().cpu().contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets), bias="none",
        task_type=TaskType.CAUSAL_LM, base_model_name_or_path=config.model.path, inference_mode=True,
    ).save_pretrained(directory)  # fmt: skip


def load_adapter(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA pairs by "layer.projection" from a peft adapter directory."""
    tensors = load_file(directory / "adapter_model.safetensors")
    pairs = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            layer, _, name = stem.removeprefix(PEFT_PREFIX + ".").split(".")
            pairs[f"{layer}.{name}"] = (tensors[key], tensors[f"{stem}.lora_B.weight"])
    return pairs


def _peft_key(key: str) -> str:
    layer, name = key.split(".")
    block = "mlp" if PROJECTIONS.index(name) >= 4 else "self_attn"
    return f"{PEFT_PREFIX}.{layer}.{block}.{name}"


def save_snapshots(directory: Path, snapshots: list[Snapshot]) -> None:
    """Write teachers as one safetensors file each, plus teachers.json with their steps and sparsities."""
    directory.mkdir(parents=True, exist_ok=True)
    index = []
    for number, s in enumerate(snapshots):
        name = f"{number:04d}.safetensors"
        tensors = {f"gates.{k}": v for k, v in s.gates.as_dict().items()}
        tensors |= {f"scores.{k}": v for k, v in s.scores.items()}
        tensors |= {f"lora.{k}.{side}": t for k, pair in s.lora.items() for side, t in zip("AB", pair, strict=True)}
        save_file(tensors, directory / name)
        index.append({"file": name, "step": s.step, "sparsity": s.sparsity})
    (directory / "teachers.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def load_snapshots(directory: Path) -> list[Snapshot]:
    """Read what `save_snapshots` wrote, in order."""
    snapshots = []
    for entry in json.loads((directory / "teachers.json").read_text(encoding="utf-8")):
        tensors = load_file(directory / entry["file"])
        part = lambda name, t=tensors: {k: t[f"{name}.{k}"] for k in KINDS if f"{name}.{k}" in t}  # noqa: E731
        keys = {k.removeprefix("lora.").removesuffix(".A") for k in tensors if k.endswith(".A")}
        lora = {k: (tensors[f"lora.{k}.A"], tensors[f"lora.{k}.B"]) for k in sorted(keys)}
        snapshots.append(Snapshot(entry["step"], entry["sparsity"], Gates(**part("gates")), part("scores"), lora))
    return snapshots


# --- the finished run ----------------------------------------------------------------------------------------------


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
    """

    directory: Path
    config: Config
    gates: Gates
    scores: dict[str, Tensor]
    lora: dict[str, tuple[Tensor, Tensor]]
    snapshots: list[Snapshot]
    sparsity: float


def save_run(
    directory: Path, config: Config, spec: ArchSpec, gates: Gates, scores, lora, snapshots, facts: dict
) -> Path:
    """Write the finished student to `<run>/pruned`, atomically. `facts` (steps, sparsity, …) go to pruned.json."""
    target = directory / "pruned"
    with atomic_directory(target) as tmp:
        save_config(tmp / "config.yaml", config)
        save_gates(tmp / "gates.safetensors", gates, scores)
        save_adapter(tmp / "adapter", lora, config)
        save_snapshots(tmp / "teachers", snapshots)
        facts = {**facts, "architecture": spec.__dict__}
        (tmp / "pruned.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return target


def load_run(directory: str | Path) -> Run:
    """Read a finished prune stage; raises `ConfigError` (one line) where it is missing, unfinished or damaged."""
    pruned = Path(directory) / "pruned"
    if not pruned.is_dir():
        raise ConfigError(
            f"{directory} holds no finished prune run (no `pruned` directory): run `nuteprune prune` first"
        )
    try:
        verify(pruned)
        gates, scores = load_gates(pruned / "gates.safetensors")
        facts = json.loads((pruned / "pruned.json").read_text(encoding="utf-8"))
        return Run(
            Path(directory), load_config(pruned / "config.yaml"), gates, scores, load_adapter(pruned / "adapter"),
            load_snapshots(pruned / "teachers"), facts["sparsity"],
        )  # fmt: skip
    except (CheckpointError, SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"the finished run in {pruned} is damaged: {error}") from None


def save_config(path: Path, config: Config) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to the same values."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
