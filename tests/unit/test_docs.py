"""The documents: short where they must be, links that lead somewhere, commands and settings that exist."""

import re
import shlex
from pathlib import Path

import pytest

from nuteprune.config import load_config
from nuteprune.config.reference import markdown
from nuteprune.flags import SHORTCUTS, parser

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for folder in (".", "docs", "kernels", "slurm") for p in ROOT.glob(f"{folder}/*.md"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def test_the_reference_of_settings_is_up_to_date():
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == markdown(), "run `make docs`"


@pages
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: no heading for {target}"


@pages
def test_every_command_shown_is_one(page):
    for command in commands(page):
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            assert words[1] in TARGETS, command
        load_config(None, re.findall(r"--set ([^\s\"]+)", command))
        if "nuteprune" in words and words[-1] != "nuteprune":
            check_stage(words[words.index("nuteprune") + 1 :], command)


def check_stage(words: list[str], command: str) -> None:
    """Parse a command line of ours as it would be, and load its settings without the file that it names."""
    try:
        args, rest = parser().parse_known_args(words)
    except SystemExit:
        pytest.fail(f"not a command: {command}")
    assert not [w for w in rest if w.startswith("-")], command
    settings = [w for w in [*getattr(args, "overrides", []), *rest] if "=" in w]
    for flag, key in SHORTCUTS.get(args.stage, {}).items():
        value = getattr(args, flag.strip("-").replace("-", "_"))
        if value is not None:
            settings.append(f"{key}=[{value}]" if flag == "--ladder" else f"{key}={value}")
    load_config(None, settings)


def commands(page: Path) -> list[str]:
    """Commands in a page: lines of indented or fenced blocks, continued ones joined, and those between backticks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)]
    lines += [line for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", text)
    starts = ("nuteprune ", "make ", "torchrun ", "deepspeed ", "srun ", "mpirun ", "OMP_NUM_THREADS=1 make ")
    placeholders = re.compile(r"STAGE|NAME|…|\bX\b|\bDIR\b")
    return [c.removeprefix("OMP_NUM_THREADS=1 ") for c in (*lines, *inline)
            if c.startswith(starts) and not placeholders.search(c)]  # fmt: skip


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
