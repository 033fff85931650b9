"""The reference of every setting as Markdown, written from the dataclass fields: `make docs`."""

from __future__ import annotations

import dataclasses
import sys
import typing
from typing import Any

import yaml

from nuteprune.config.fields import STAGE_SECTIONS, Config
from nuteprune.config.loading import RECIPES
from nuteprune.config.values import BOUNDS, default_of, type_name

HEAD = """\
# Configuration

Written by `make docs` from the fields in `pipeline/config/fields.py`: change it there.

Settings come in layers, and later ones win: the recipe, your YAML file (`--config my.yaml`), then `key.sub=value` on
the command line. A misspelt key or a wrong value is one line that names the key, and exit code 2. The resolved settings
are saved as `config.yaml` in the run's directory, which from then on stands for `--config`. `nuteprune STAGE --help`
prints what a stage reads.
"""


def markdown() -> str:
    """The whole page: recipes, the settings outside sections, then one table a section."""
    hints = typing.get_type_hints(Config)
    sections = [f for f in dataclasses.fields(Config) if dataclasses.is_dataclass(hints[f.name])]
    single = [f for f in dataclasses.fields(Config) if f not in sections]
    parts = [HEAD, _recipes(), "## Settings of the run\n", _table(single, hints, "")]
    for f in sections:
        stages = ", ".join(f"`{stage}`" for stage, names in STAGE_SECTIONS.items() if f.name in names)
        cls, heading = hints[f.name], f"## `{f.name}`\n\n{hints[f.name].__doc__} Read by {stages}.\n"
        parts += [heading, _table(dataclasses.fields(cls), typing.get_type_hints(cls), f"{f.name}.")]
    return "\n".join(parts)


def _recipes() -> str:
    """A row for each recipe of the package, with the comment at the head of its file."""
    lines = ["## Recipes\n", "`recipe: NAME` in the YAML file, or `recipe=NAME` on the command line.\n"]
    lines += ["| recipe | what it is |", "|---|---|"]
    for path in sorted(RECIPES.glob("*.yaml")):
        head = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("# "):
                break
            head.append(line[2:])
        lines.append(f"| `{path.stem}` | {' '.join(head)} |")
    return "\n".join(lines) + "\n"


def _table(fields: typing.Iterable[dataclasses.Field], hints: dict[str, Any], prefix: str) -> str:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for f in fields:
        bounds = [f"{word} {f.metadata[name]:g}" for name, (word, _) in BOUNDS.items() if f.metadata[name] is not None]
        kind = ", ".join([type_name(hints[f.name]), *bounds]).replace("|", "\\|")
        lines.append(f"| `{prefix}{f.name}` | {kind} | `{_yaml(default_of(f))}` | {f.metadata['help']} |")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """A default as one would write it in a YAML file."""
    if value == "":
        return '""'
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    sys.stdout.write(markdown())
