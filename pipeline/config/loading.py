"""From a recipe, a YAML file and `key.sub=value` overrides to a checked `Config`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nuteprune.config.fields import ASKED_EACH_TIME, Config
from nuteprune.config.values import build, check_keys, flatten, merge, to_dict
from nuteprune.errors import UserError

RECIPES, DS_CONFIGS = (Path(__file__).parents[1] / name for name in ("recipes", "ds_configs"))
YAML_LIMIT = 1 << 20
"""Bytes of a YAML file that is read: every field with its comments has a hundredth of that."""


def load_config(settings: Config | Mapping | str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Build a `Config` from its recipe, then the user's settings, then `key.sub=value` overrides (later wins).

    Args:
        settings: YAML file, directory of a run (its config.yaml), nested dict, `Config`, or None.
        overrides: strings `key.sub=value`; a text is taken as it stands, other values are read as YAML.

    Raises:
        UserError: unreadable file, unknown key, wrong type or value out of range.
    """
    layers = _layers(settings, overrides)
    name = str(next((tree["recipe"] for _, tree in reversed(layers) if tree.get("recipe")), "default"))
    tree: dict = {}
    for source, layer in [*_recipe_layers(name), *layers]:
        check_keys(Config, layer, source, "")
        tree = merge(tree, layer)
    tree["recipe"] = name
    return _consistent(build(Config, tree, ""))


def given_keys(settings: Config | Mapping | str | Path | None, overrides: Sequence[str] = ()) -> set[str]:
    """Keys `section.field` that are set by the user, to whatever value, or by another recipe than the default.

    Arguments and errors as of `load_config`.
    """
    default, config = (flatten(to_dict(each)) for each in (load_config(None), load_config(settings, overrides)))
    return said_keys(settings, overrides) | {key for key, value in config.items() if value != default[key]}


def said_keys(settings: Config | Mapping | str | Path | None, overrides: Sequence[str] = ()) -> set[str]:
    """Keys `section.field` that stand in settings or overrides; arguments and errors as of `load_config`."""
    return {key for _, layer in _layers(settings, overrides) for key in flatten(layer)}


def _layers(settings: Config | Mapping | str | Path | None, overrides: Sequence[str]) -> list[tuple[str, dict]]:
    """What the user sets, as nested dicts by where it stands; later ones win."""
    layers: list[tuple[str, dict]] = []
    if isinstance(settings, Config):
        layers.append(("settings", to_dict(settings)))
    elif isinstance(settings, Mapping):
        layers.append(("settings", dict(settings)))
    elif settings is not None and Path(settings).is_dir():
        file = Path(settings) / "config.yaml"
        if not file.is_file():
            raise UserError(f"{settings} is not the directory of a run: it has no config.yaml")
        # The directory may have been moved since.
        layers += [(str(file), read_yaml(file)), ("the run's directory", {"run_dir": str(settings)})]
    elif settings is not None:
        layers.append((str(settings), read_yaml(Path(settings))))
    for item in overrides:
        key, sep, value = item.partition("=")
        if not sep or not key:
            raise UserError(f"'{item}' is no run directory, nor a setting: write it as key.sub=value")
        nested: Any = _read_value(key, value, item)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        layers.append((f"override '{item}'", nested))
    return layers


def _read_value(key: str, text: str, item: str) -> Any:
    """The value of an override: text without quotes or control characters as it stands, all else read as YAML."""
    cls: Any = Config
    for part in key.split("."):
        cls = typing.get_type_hints(cls).get(part) if dataclasses.is_dataclass(cls) else None
    if cls is str and text.isprintable() and text != "null" and not text.startswith(("'", '"')):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # 2026-02-30 is no date
        raise UserError(f"override '{item}': the value is not readable as YAML") from None


def beyond_recipe(config: Config, given: Collection[str] = ()) -> dict:
    """The settings that differ from those of the recipe, as a nested dict that a YAML file can hold.

    Args:
        config: all settings.
        given: keys `section.field` that are in it whatever their values.
    """
    recipe, shape = f"recipe={config.recipe}", f"gates.shape={config.gates.shape}"
    base = flatten(to_dict(load_config(None, [recipe])))
    base["gates.units"] = load_config(None, [recipe, shape]).gates.units  # which follow from the shape
    tree: dict[str, Any] = {"recipe": config.recipe}
    asked = {f"{section}.{field}" for section, field in ASKED_EACH_TIME}
    for key, value in flatten(to_dict(config)).items():
        if (key in given or value != base[key]) and key not in asked:
            *section, name = key.split(".")
            inner = tree.setdefault(section[0], {}) if section else tree
            inner[name] = value
    return tree


def _consistent(config: Config) -> Config:
    """Checks over several fields; no ranks of `lora.refit` where no FFN unit leaves or down_proj has no LoRA."""
    taught = {key: weight for key, weight in vars(config.loss).items() if key.endswith("_weight")}
    del taught["label_weight"]
    if config.teacher.mode != "none" and not any(taught.values()):
        names = " and ".join(f"loss.{key}" for key in taught)
        raise UserError(f"{names} are 0: nothing would be learned of a teacher; set one of them, or teacher.mode=none")
    if not ("down_proj" in config.lora.targets and "ffn" in config.gates.units):
        config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, refit=0))
    return config


def _recipe_layers(name: str, above: tuple[str, ...] = ()) -> list[tuple[str, dict]]:
    """A recipe's file, behind those of the recipes that it names as its base."""
    if name in above:
        raise UserError(f"recipe '{name}' is its own base: {' -> '.join((*above, name))}")
    tree = read_yaml(recipe_path(name))
    base = tree.get("recipe")
    return [*(_recipe_layers(str(base), (*above, name)) if base else []), (f"recipe {name}", tree)]


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe given by name or path."""
    for path in (RECIPES / f"{name}.yaml", Path(name)):
        if path.suffix == ".yaml" and path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
    raise UserError(f"recipe '{name}' not found: use one of {known}, or the path of a YAML file")


def deepspeed_path(name: str) -> Path:
    """The JSON file of DeepSpeed settings given by name or path."""
    path = next((p for p in (DS_CONFIGS / f"{name}.json", Path(name)) if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.stem for p in DS_CONFIGS.glob("*.json")))
        raise UserError(f"deepspeed '{name}': no such file; use one of {known}, or the path of a JSON file")
    return path


class _PlainLoader(yaml.SafeLoader):
    """Plain values only: a few lines of aliases (*name) to aliases stand for more text than any memory holds. And no
    key twice, of which the last would win and take a whole section with it."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem_mark=key.start_mark, note=f": '{key.value}' stands there again")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; raises `UserError` where there is none."""
    tree = _plain_values(path)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold `key: value` lines at its top level")
    _refuse_asked(tree, path)
    return tree


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The settings `section.field` of each run of a sweep; raises `UserError` where a file is no list of settings."""
    entries = _plain_values(path)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) and entry for entry in entries):
        raise UserError(f"{path} must be a YAML list of settings, such as `- {{sparsity.target: 0.3}}`")
    flat = [flatten(entry) for entry in entries]
    for entry in flat:
        _refuse_asked(entry, path)
    return flat


def _refuse_asked(tree: dict, path: Path) -> None:
    flat = flatten(tree)
    for section, field in ASKED_EACH_TIME:
        if f"{section}.{field}" in flat:
            raise UserError(
                f"{path} sets {section}.{field}, which no file can: give {section}.{field}=… when you start the stage"
            )


def _plain_values(path: Path) -> Any:
    try:
        if path.stat().st_size > YAML_LIMIT:
            raise UserError(f"{path} has more than {YAML_LIMIT} bytes: settings are shorter")
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, note = getattr(error, "problem_mark", None), getattr(error, "note", None) or ""
        raise UserError(f"{path} is not valid YAML{f' (line {mark.line + 1})' if mark else ''}{note}") from None
