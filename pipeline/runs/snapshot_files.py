"""Snapshots on disk: teachers.json and safetensors files, each written once and linked into the directories behind it.

All checkpoints of a run are of its past, and a snapshot never changes: what the newest of them has need not be written
again. A hard link shares what becomes of the file on the disk, its damage too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from nuteprune.masks import KINDS, Gates
from nuteprune.runs.checkpoint import inside, read_json
from nuteprune.runs.snapshot import Pairs, Snapshot

FOLDER = "teachers"


def save_snapshots(directory: Path, snapshots: list[Snapshot], lender: Path | None = None) -> None:
    """Write snapshots below `directory`, with their steps and sparsities in teachers.json.

    Args:
        lender: the newest checkpoint of the run, whose files are taken where it has them.
    """
    folder, index = directory / FOLDER, []
    written: dict[int, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for s in snapshots:
        entry: dict[str, Any] = {"file": f"{s.step:08d}.safetensors", "step": s.step, "sparsity": s.sparsity,
                                 "teaches": s.teaches}  # fmt: skip
        _write(folder, entry["file"], gate_tensors(s.gates, s.scores) | pair_tensors(s.lora, "lora"), lender)
        if s.frozen:
            name = written.setdefault(id(s.frozen), f"frozen-{s.step:08d}.safetensors")
            entry["frozen"] = name
            if not (folder / name).exists():
                _write(folder, name, pair_tensors(s.frozen, "frozen"), lender)
        index.append(entry)
    (folder / "teachers.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def load_snapshots(directory: Path, rungs: bool = True) -> list[Snapshot]:
    """Read what `save_snapshots` wrote, in order; raises `CheckpointError` for a file that is not in the directory.

    Args:
        rungs: read those too that do not teach; without, their tensors are left out.
    """
    folder, snapshots = directory / FOLDER, []
    frozen: dict[str, Pairs] = {"": {}}
    path = folder / "teachers.json"
    for entry in read_json(path) if path.is_file() else []:
        teaches, name = entry.get("teaches", True), str(entry.get("frozen", ""))
        if not teaches and not rungs:
            snapshots.append(Snapshot(entry["step"], entry["sparsity"], Gates(), {}, {}, teaches=False))
            continue
        tensors = load_file(inside(folder, str(entry["file"])))
        if name not in frozen:
            frozen[name] = tensor_pairs(load_file(inside(folder, name)), "frozen")
        gates, scores = split_gates(tensors)
        pairs = tensor_pairs(tensors, "lora"), frozen[name]
        snapshots.append(Snapshot(entry["step"], entry["sparsity"], gates, scores, *pairs, teaches))
    return snapshots


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor], lender: Path | None) -> None:
    if lender is not None:
        try:
            os.link(lender / FOLDER / name, folder / name)
            return
        except OSError:  # not there, or a file system without links
            pass
    save_file(dict(tensors), folder / name)


def gate_tensors(gates: Gates, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gates and log-alpha by their names in a file."""
    tensors = {f"gates.{k}": v for k, v in gates.as_dict().items()} | {f"scores.{k}": v for k, v in scores.items()}
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


def split_gates(tensors: Mapping[str, Tensor]) -> tuple[Gates, dict[str, Tensor]]:
    """The inverse of `gate_tensors`."""
    gates = {k: tensors[f"gates.{k}"] for k in KINDS if f"gates.{k}" in tensors}
    return Gates(**gates), {k: tensors[f"scores.{k}"] for k in KINDS if f"scores.{k}" in tensors}


def pair_tensors(pairs: Mapping[str, tuple[Tensor, Tensor]], what: str) -> dict[str, Tensor]:
    """Pairs by their names in a file."""
    named = {f"{what}.{key}.{side}": t for key, pair in pairs.items() for side, t in zip("AB", pair, strict=True)}
    return {name: t.detach().cpu().contiguous() for name, t in named.items()}


def tensor_pairs(tensors: Mapping[str, Tensor], what: str) -> Pairs:
    """The inverse of `pair_tensors`."""
    keys = [k[len(what) + 1 : -2] for k in tensors if k.startswith(f"{what}.") and k.endswith(".A")]
    return {k: (tensors[f"{what}.{k}.A"], tensors[f"{what}.{k}.B"]) for k in sorted(keys)}
