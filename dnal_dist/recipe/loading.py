"""Recipes from YAML files and key=value overrides."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dnal_dist.common.errors import InputError
from dnal_dist.common.shipped import shipped
from dnal_dist.recipe.schema import Recipe

_EITHER = {
    **{"epochs": "steps", "steps": "epochs", "macs": "params", "params": "macs"},
    **{"penalty_weight": "target", "target": "penalty_weight"},
}


class _Loader(yaml.SafeLoader):
    """YAML without its two traps: 1e-4 is a number here, and a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def find(name: str | Path) -> Path:
    """File of a recipe: `name` or name.yaml in the working directory, else the packaged recipe of that name (digits, or
    recipes/digits.yaml). Raises InputError."""
    folder = shipped("recipes")
    for path in (Path(name), Path(f"{name}.yaml"), folder / f"{name}.yaml", folder.parent / name):
        if path.exists() and not path.is_dir():
            return path
    if Path(name).exists():
        return Path(name)
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise InputError(f"{name}: no such recipe; give a file, or the name of a packaged one: {names}")


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read the recipe at `path` (see `find`), apply `key=value` overrides (dotted keys, YAML values) and check it.

    Raises InputError, a ValueError, naming the file, the key, what was expected and the remedy.
    """
    path = find(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected keys such as 'name: ...', found {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{path}: " + "; ".join(_describe(e) for e in error.errors())) from None


def _override(tree: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: expected key=value, for example architecture.penalty_weight=0.02")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"override {override!r}: not a YAML value: {' '.join(str(error).split())}") from None
    *parents, last = key.split(".")
    for parent in parents:
        tree.pop(_EITHER.get(parent), None)
        if not isinstance(tree.setdefault(parent, {}), dict):
            raise InputError(f"override {override!r}: {parent!r} is a value, it has no keys")
        tree = tree[parent]
    # Asking for one of two that exclude each other replaces the recipe's own.
    if other := _EITHER.get(last):
        tree.pop(other, None)
    tree[last] = value


def _describe(error: dict) -> str:
    location = [part for part in error["loc"] if part not in ("constant", "steps", "cosine") or part == error["loc"][-1]]
    key = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_suggestion(location)}; remove or rename it"
    if error["type"] == "missing":
        return f"key '{key}' is missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    found = "" if error["type"] == "value_error" else f", found {error['input']!r}"
    return f"key '{key}': {message[0].lower()}{message[1:]}{found}"


def _suggestion(location: list[Any]) -> str:
    model: Any = Recipe
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field else None
    known = list(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1]), known, 1)
    return f" (did you mean '{close[0]}'?)" if close else f" (known here: {', '.join(known)})" if known else ""


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load` gives the same recipe back."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, width=120)
