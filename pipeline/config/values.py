"""Between nested dicts and the checked dataclasses of `fields`: keys, types and bounds, and fields in words."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
import textwrap
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from nuteprune.config.fields import Config
from nuteprune.errors import UserError


def build(cls: type, tree: dict, prefix: str) -> Any:
    """A dataclass of type `cls` from a nested dict whose keys were checked; converts and checks each value."""
    hints = typing.get_type_hints(cls)
    values = {}
    for f in dataclasses.fields(cls):
        if f.name not in tree:
            continue
        key, value, hint = prefix + f.name, tree[f.name], hints[f.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            values[f.name] = build(hint, value or {}, key + ".")
        else:
            values[f.name] = _bounded(_convert(value, hint, key), f, key)
    return cls(**values)


def to_dict(config: Config) -> dict:
    """The resolved configuration as plain nested dicts, as saved in the run directory."""
    return dataclasses.asdict(config)


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with `section.field` keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def describe(sections: list[str]) -> str:
    """The settings outside sections and every field of the given ones with type, default and meaning, for `--help`."""
    hints = typing.get_type_hints(Config)
    single = [f for f in dataclasses.fields(Config) if not dataclasses.is_dataclass(hints[f.name])]
    parts = [_describe(Config, single, "")]
    parts += [_describe(hints[section], dataclasses.fields(hints[section]), f"{section}.") for section in sections]
    return "\n\n".join(parts)


def _describe(cls: type, fields: Iterable[dataclasses.Field], prefix: str) -> str:
    """A heading, and a paragraph for each field."""
    lines, hints = [f"{cls.__doc__}\n"], typing.get_type_hints(cls)
    for f in fields:
        lines.append(f"  {prefix}{f.name} ({type_name(hints[f.name])}, default {default_of(f)!r})")
        lines.append(textwrap.fill(f.metadata["help"], 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def default_of(f: dataclasses.Field) -> Any:
    """A field's default, also where it is made anew each time."""
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def check_keys(cls: type, tree: dict, source: str, prefix: str) -> None:
    """Raise `UserError` for a key of a nested dict that is none of a dataclass's; `source` says where it stands."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in tree.items():
        if key not in names:
            near = _elsewhere(str(key)) or difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean '{prefix + near[0] if near[0] in names else near[0]}'?" if near else ""
            raise UserError(f"{source}: unknown key '{prefix}{key}'{hint}")
        if dataclasses.is_dataclass(hints[key]):
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{source}: '{prefix}{key}' is a section; set its fields, e.g. {prefix}{key}.…")
            check_keys(hints[key], value or {}, source, f"{prefix}{key}.")
        elif isinstance(value, dict):
            raise UserError(f"{source}: '{prefix}{key}' is one setting, not a section of several")


def _elsewhere(key: str) -> list[str]:
    """The full name of a key that exists in another section."""
    hints = typing.get_type_hints(Config)
    full = [
        f"{section}.{f.name}"
        for section, cls in hints.items()
        if dataclasses.is_dataclass(cls)
        for f in dataclasses.fields(cls)
        if f.name == key
    ]
    return full[:1]


def merge(base: dict, layer: dict) -> dict:
    """A nested dict with the values of another over its own."""
    merged = dict(base)
    for key, value in layer.items():
        if isinstance(value, dict):
            merged[key] = merge(base.get(key) or {}, value)
        elif value is not None or not isinstance(base.get(key), dict):  # a section without lines says nothing
            merged[key] = value
    return merged


def type_name(hint: Any) -> str:
    """A field's type in a user's words."""
    if typing.get_origin(hint) is Literal:
        return " | ".join(str(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"list of {type_name(typing.get_args(hint)[0])}"
    return getattr(hint, "__name__", str(hint))


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value in typing.get_args(hint):
            return value
    elif origin is list:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, (list, tuple)):
            return [_convert(item, typing.get_args(hint)[0], key) for item in value]
    elif origin in (typing.Union, types.UnionType):
        raise AssertionError(f"{key}: unions are not used in the configuration")
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is float and isinstance(value, str):
        # YAML 1.1 reads `1e-3` (no dot) as text; a user means the number.
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is str and value is None:
        return ""  # `key=` on the command line
    elif hint is str and isinstance(value, str):
        return os.path.expanduser(value)  # ~/runs
    elif hint in (int, bool) and type(value) is hint:
        return value
    expected = "text (in quotes)" if hint is str else type_name(hint)
    near = difflib.get_close_matches(str(value), [str(a) for a in typing.get_args(hint)], n=1)
    raise UserError(f"{key}: expected {expected}, got {value!r}" + (f"; did you mean '{near[0]}'?" if near else ""))


BOUNDS = {
    "ge": ("at least", operator.ge),
    "gt": ("greater than", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("less than", operator.lt),
}
"""The bounds of `opt`: in words, and what holds."""


def _bounded(value: Any, f: dataclasses.Field, key: str) -> Any:
    bounds = [(*BOUNDS[name], limit) for name, limit in f.metadata.items() if name in BOUNDS and limit is not None]
    for each in value if isinstance(value, list) else [value]:
        if not all(holds(each, limit) for _, holds, limit in bounds):
            wanted = " and ".join(f"{word} {limit}" for word, _, limit in bounds)
            share = isinstance(each, float) and f.metadata.get("lt") == 1 <= each < 100
            hint = f"; did you mean {each / 100:g}?" if share else ""
            raise UserError(f"{key}: must be {wanted}, got {each:g}{hint}")
        if isinstance(each, float) and not math.isfinite(each):
            raise UserError(f"{key}: must be a finite number, got {each!r}")
    return value
