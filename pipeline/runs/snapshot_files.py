"""Snapshots on disk: teachers.json and safetensors files, each written once and linked into the directories behind it.

All checkpoints of a run are of its past, and a snapshot never changes: what the newest of them has need not be written
again. A hard link shares what becomes of the file on the disk, its damage too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nuteprune.errors import MachineError
from nuteprune.masks import KINDS, Gates
from nuteprune.runs.checkpoint import inside, read_json
from nuteprune.runs.snapshot import Pairs, Snapshot

FOLDER = "teachers"


def save_snapshots(
    directory: Path, snapshots: list[Snapshot], lender: Path | None = None, rungs: Path | None = None
) -> None:
    """Write snapshots below `directory`, with their steps and sparsities in teachers.json.

    Args:
        lender: the newest checkpoint of the run, whose files are taken where it has them.
        rungs: where `write_rung` has put what came since then.
    """
    folder, index = directory / FOLDER, []
    folder.mkdir(parents=True, exist_ok=True)
    lenders = [place for place in (lender and lender / FOLDER, rungs) if place is not None]
    for s in snapshots:
        entry: dict[str, Any] = {"file": _name(s), "step": s.step, "sparsity": s.sparsity, "teaches": s.teaches}
        if s.fitted is not None:
            entry |= {"frozen": _frozen(s), "fitted": s.fitted}
        for name, tensors in _files(s).items():
            if not (folder / name).exists() and not _link(folder / name, lenders) and tensors:
                save_file(tensors, folder / name)
        index.append(entry)
    (folder / "teachers.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_rung(folder: Path, rung: Snapshot) -> None:
    """Write a snapshot for the next `save_snapshots`, so that it takes no memory; `MachineError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in _files(rung).items():
            if not (folder / name).exists():  # another rung of the same fit has written its frozen pairs
                save_file(tensors, folder / name)
    except (OSError, SafetensorError) as error:
        raise MachineError(f"cannot write {folder}: {error}; free space or choose another directory") from None


def load_snapshots(directory: Path, rungs: bool = True) -> list[Snapshot]:
    """Read what `save_snapshots` wrote, in order; raises `CheckpointError` for a file that is not in the directory.

    Args:
        rungs: read those too that do not teach; without, their tensors are left out.
    """
    folder, snapshots = directory / FOLDER, []
    frozen: dict[str, Pairs] = {"": {}}
    path = folder / "teachers.json"
    for entry in read_json(path) if path.is_file() else []:
        facts = entry.get("fitted"), entry.get("teaches", True)
        s = Snapshot(entry["step"], entry["sparsity"], Gates(), {}, {}, {}, *facts)
        if s.teaches or rungs:
            tensors, name = load_file(inside(folder, str(entry["file"]))), str(entry.get("frozen", ""))
            if name not in frozen:
                frozen[name] = tensor_pairs(load_file(inside(folder, name)), "frozen")
            gates, scores = split_gates(tensors)
            s = replace(s, gates=gates, scores=scores, lora=tensor_pairs(tensors, "lora"), frozen=frozen[name])
        snapshots.append(s)
    return snapshots


def _name(s: Snapshot) -> str:
    return f"{s.step:08d}.safetensors"


def _frozen(s: Snapshot) -> str:
    return f"frozen-{s.fitted:08d}.safetensors"


def _files(s: Snapshot) -> dict[str, dict[str, Tensor]]:
    """The files of a snapshot; empty where its tensors lie on the disk already."""
    files = {_name(s): gate_tensors(s.gates, s.scores) | pair_tensors(s.lora, "lora")}
    return files if s.fitted is None else files | {_frozen(s): pair_tensors(s.frozen, "frozen")}


def _link(path: Path, lenders: list[Path]) -> bool:
    """Make a file the same as that of its name in the first directory that has it; a copy where there are no links."""
    for folder in lenders:
        if (folder / path.name).is_file():
            try:
                os.link(folder / path.name, path)
            except OSError:  # a file system without links
                shutil.copyfile(folder / path.name, path)
            return True
    return False


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
