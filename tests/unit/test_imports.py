"""Imports go down only: who may import whom, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEVELS = [
    {"kernels"},
    {"config", "jobs"},
    {"arch", "distributed"},
    {"masks"},
    {
        "layers",
        "distill",
        "checkpoint",
        "data",
        "tracking",
        "pictures",
        "tasks",
        "models",
        "modeling_ragged",
    },
    {"pairing", "teachers", "report", "folding", "fetch", "footprint", "shards", "fingerprint", "instructions"},
    {"engine", "zero", "importance", "rundir", "costs", "measure", "publish"},
    {"resume", "planner", "students", "speed"},
    {"model_card"},
    {"lifecycle", "prepared"},
    {"training", "masked", "dryrun"},
    {"stages"},
    {"ladder"},
    {"api"},
    {"__main__"},
    {"bench"},
]  # fmt: skip
"""From the bottom up: a room may import from rooms below its own, never from its own level or above."""

FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def room(path: Path) -> str:
    """The name in `LEVELS` of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def level(name: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if name in names)


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    if path == ROOT / "pipeline/__init__.py":  # importing the package imports nothing until a call is used
        assert imported(path) == {"pipeline.api"}
        assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(path.read_text()).body)
        return
    own = room(path)
    assert any(own in names for names in LEVELS), f"{own} has no level: give it one"
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top not in ("pipeline", "kernels"):
            continue
        other = "kernels" if top == "kernels" else rest.split(".")[0]
        if other == own and own != "stages":
            continue
        if not any(other in names for names in LEVELS):  # a name of the package itself
            continue
        assert level(other) < level(own), f"{own} imports {name}"


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "kernels", *sys.stdlib_module_names}
    for path in ROOT.glob("kernels/*.py"):
        if path.name == "bench.py":
            continue
        assert {n.split(".")[0] for n in imported(path)} <= allowed, path


def test_every_level_exists():
    rooms = {room(p) for p in FILES if p != ROOT / "pipeline/__init__.py"}
    assert set.union(*LEVELS) == rooms
