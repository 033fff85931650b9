"""Imports go down only: who may import whom, read from the source."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ROOMS = (
    "errors", "kernels", "config", "arch", "masks", "model", "runs", "data", "parallel", "training", "exporting",
    "evaluation", "planning", "distilling", "stages", "chain", "flags", "api", "__main__",
)  # fmt: skip
"""From the bottom up: a room imports from rooms before it, never from those behind it."""

FOLDERS = {"pipeline": "nuteprune", "kernels": "nuteprune.kernels"}
FILES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))


def room(path: Path) -> str:
    """The name in `ROOMS` of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


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
def test_imports_go_one_way(path):
    if path == ROOT / "pipeline/__init__.py":  # importing the package imports nothing until a call is used
        assert {name.rpartition(".")[0] for name in imported(path)} <= {
            "nuteprune",
            "nuteprune.api",
            "importlib.metadata",
        }
        assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(path.read_text()).body)
        return
    own = room(path)
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert top not in FOLDERS or top == "kernels", f"{name}: the package is called nuteprune"
        other = rest.split(".")[0]
        if top == "nuteprune" and other != own:
            assert other in ROOMS, f"{name}: give its room a place in ROOMS"
            assert ROOMS.index(other) < ROOMS.index(own), f"{own} imports {name}"


def test_stages_do_not_import_each_other():
    for path in ROOT.glob("pipeline/stages/*.py"):
        assert not [name for name in imported(path) if name.startswith("nuteprune.stages")], path


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in ROOT.glob("kernels/*.py"):
        names = {n for n in imported(path) if not n.startswith("nuteprune.kernels")}
        assert {n.split(".")[0] for n in names} <= allowed, path


def test_every_room_exists_and_says_what_it_is_for():
    assert set(ROOMS) == {room(p) for p in FILES if p != ROOT / "pipeline/__init__.py"}
    for path in ROOT.glob("pipeline/*/__init__.py"):
        assert len(ast.get_docstring(ast.parse(path.read_text())).splitlines()) > 2, path


def test_every_test_is_collected(pytestconfig):
    """No folder has a name that pytest passes over, and no two files one name, of which it takes one."""
    files = sorted((ROOT / "tests").glob("**/test_*.py"))
    folders = {folder.name for file in files for folder in file.relative_to(ROOT).parents if folder.name}
    passed_over = pytestconfig.getini("norecursedirs")
    assert not [name for name in folders for pattern in passed_over if fnmatch(name, pattern)]
    assert len({file.name for file in files}) == len(files)


def test_ranks_start_without_what_one_of_them_needs_at_times():
    stages = ", ".join(f"nuteprune.stages.{name}" for name in ("prune", "recover", "finetune", "distill"))
    told = f"import sys, {stages}; print(*(m for m in ('datasets', 'matplotlib', 'peft') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert not done.stdout.split()
