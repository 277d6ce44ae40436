"""Recipes from YAML files and key=value overrides."""

import difflib
import re
import reprlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dnal_dist.common import errors
from dnal_dist.common.errors import InputError
from dnal_dist.common.files import read_regular
from dnal_dist.common.paths import expanded
from dnal_dist.common.shipped import shipped
from dnal_dist.common.text import printable
from dnal_dist.recipe.schema import Recipe

_EITHER = {
    **{"epochs": "steps", "steps": "epochs", "macs": "params", "params": "macs"},
    **{"penalty_weight": "target", "target": "penalty_weight"},
}
# Bytes of a recipe, its values once aliases are resolved, brackets within brackets, and faults that are listed: no file may take
# longer than a second.
LARGEST, MOST_VALUES, DEEPEST, LISTED = 32 << 10, 4000, 20, 5


class _Short(reprlib.Repr):
    """Values in messages, whatever their size."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxstring, self.maxother = 2, 4, 4, 4, 160, 80


_short = _Short().repr


class _Loader(yaml.SafeLoader):
    """YAML without its traps: 1e-4 is a number here, a key given twice is an error, and aliases make a document only so large."""

    def construct_document(self, node):
        if _values(node, {}) > MOST_VALUES:
            raise _fault(f"more than {MOST_VALUES} values", node)
        return super().construct_document(node)

    def fetch_flow_collection_start(self, token):
        # Its search for keys takes the square of the depth.
        if self.flow_level >= DEEPEST:
            raise yaml.scanner.ScannerError(None, None, f"nested more than {DEEPEST} deep", self.get_mark())
        super().fetch_flow_collection_start(token)

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            # A date of month 99, a tag that lies: YAML's own constructors have no errors for these.
            raise _fault(f"not a value ({errors.reason(error)})", node) from None

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise _fault(f"key {_short(twice)} is given twice", node)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node):
        if len(str(node.value)) > 40 or abs(value := super().construct_yaml_int(node)) >= 1 << 63:
            raise _fault("a number of more than 18 digits", node)
        return value


def _fault(why: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, why, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _values(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """Values in a node, those of an alias wherever it stands; infinite if a node contains itself."""
    if node not in known:
        known[node] = float("inf")
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        known[node] = 1 + sum(_values(one, known) for part in parts for one in (part if isinstance(part, tuple) else (part,)))
    return known[node]


def parsed(text: str, what: str) -> Any:
    """The value of a YAML text. Raises InputError, whatever the text is."""
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # a parser meets more than it has errors for
        why = errors.reason(error) if not isinstance(error, RecursionError) else "nested too deep"
        raise InputError(f"{what}: {why}") from None


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
    path = find(expanded(str(path)))
    try:
        text = read_regular(path, LARGEST).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    tree = parsed(text, f"{path}: not valid YAML")
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected keys such as 'name: ...', found {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{path}: {faults(error)}") from None


def _override(tree: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    shown = _short(override)
    if not equals or not key:
        raise InputError(f"override {shown}: expected key=value, for example architecture.penalty_weight=0.02")
    value = parsed(text[: LARGEST + 1], f"override {shown}: not a YAML value")
    *parents, last = key.split(".")
    for parent in parents:
        tree.pop(_EITHER.get(parent), None)
        if tree.get(parent) is None:  # or null, as in a recipe with its defaults
            tree[parent] = {}
        if not isinstance(tree[parent], dict):
            raise InputError(f"override {shown}: {parent!r} is a value, it has no keys")
        tree = tree[parent]
    # Asking for one of two that exclude each other replaces the recipe's own.
    if other := _EITHER.get(last):
        tree.pop(other, None)
    tree[last] = value


def faults(error: ValidationError, section: type[BaseModel] = Recipe) -> str:
    """One line about all that pydantic found wrong with a `section`."""
    found = error.errors(include_url=False)
    more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return "; ".join(_describe(one, section) for one in found[:LISTED]) + more


def _describe(error: dict, section: type[BaseModel]) -> str:
    location = [part for part in error["loc"] if part not in ("constant", "steps", "cosine") or part == error["loc"][-1]]
    key = _short(".".join(map(str, location)))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggestion(location, section)}; remove or rename it"
    if error["type"] == "missing":
        return f"key {key} is missing; add it"
    message = printable(error["msg"]).removeprefix("Value error, ")
    found = "" if error["type"] == "value_error" else f", found {_short(error['input'])}"
    return f"{f'key {key}: ' if location else 'key '}{message[0].lower()}{message[1:400]}{found}"


def _suggestion(location: list[Any], section: type[BaseModel]) -> str:
    model: Any = section
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field else None
    known = list(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1])[:80], known, 1)
    return f" (did you mean '{close[0]}'?)" if close else f" (known here: {', '.join(known)})" if known else ""


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load` gives the same recipe back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)
