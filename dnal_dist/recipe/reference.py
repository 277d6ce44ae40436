"""Every key of a recipe as a page of Markdown, from the schema."""

from collections.abc import Iterator
from typing import Any

import yaml

from dnal_dist.recipe.schema import Recipe

HEAD = """\
# Recipes, key by key

<!-- python -m dnal_dist.recipe --describe > docs/recipe.md -->

Every key, its type, its default and what it means. A recipe is a YAML file of these; overrides on a command line have the same
names, with dots: `phases.finetune.optimizer.lr=0.05`. `python -m dnal_dist.recipe RECIPE` checks a recipe and prints it with all
defaults, and `--new` writes a first one ([own-images.md](own-images.md)). Unknown keys are refused. A *required* key has none.

## Editors

A schema gives completion, meanings and faults while you type:

```sh
python -m dnal_dist.recipe --schema > recipe.schema.json
```

Editors with the YAML language server (VS Code's extension YAML, Neovim, Emacs, Helix) take it by the first line of a recipe,
`# yaml-language-server: $schema=recipe.schema.json`; or VS Code by its settings, for all recipes:

```json
{"yaml.schemas": {"./recipe.schema.json": ["recipes/*.yaml", "own.yaml"]}}
```

PyCharm takes the file under *Languages & Frameworks, Schemas and DTDs, JSON Schema Mappings*.
"""


def reference() -> str:
    """The page docs/recipe.md."""
    schema = Recipe.model_json_schema()
    sections: dict[str, list[str]] = {}
    for path, section in _sections(schema, schema["$defs"], ""):
        sections.setdefault(section, []).append(path)
    parts = [HEAD, _table("The recipe", schema, schema["$defs"])]
    for name, paths in sections.items():
        parts.append(_table(", ".join(paths), schema["$defs"][name], schema["$defs"]))
    return "\n".join(parts)


def _sections(part: dict, known: dict[str, dict], head: str) -> Iterator[tuple[str, str]]:
    """Dotted path and name of each section in a part of the schema, its own first."""
    for key, value in part["properties"].items():
        for name in _references(value):
            yield f"{head}{key}{_kind(known[name])}", name
            yield from _sections(known[name], known, f"{head}{key}.")


def _references(value: dict) -> list[str]:
    found = [one["$ref"] for one in (value, *value.get("anyOf", ()), *value.get("oneOf", ())) if "$ref" in one]
    return [one.rpartition("/")[2] for one in found]


def _kind(section: dict) -> str:
    """What tells a section from others at the same key."""
    kind = section["properties"].get("kind", {}).get("const")
    return f" (kind: {kind})" if kind else ""


def _table(title: str, part: dict, known: dict[str, dict]) -> str:
    lines = [f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in part["properties"].items():
        default = "*required*" if key in part.get("required", ()) else _default(value, known)
        meaning = " ".join(value.get("description", "").split()).replace("|", "\\|").replace("*", "\\*")
        lines.append(f"| `{key}` | {_type(value)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(value: dict, known: dict[str, dict]) -> str:
    if "const" in value:
        return f"`{value['const']}`"
    default = value.get("default")
    if _references(value):
        # Of a section that has a table of its own, what differs from its defaults.
        if default is None:
            return "`null`" if any(one.get("type") == "null" for one in value.get("anyOf", ())) else "see its keys"
        own = known[_references(value)[0]]["properties"]
        default = {key: found for key, found in default.items() if found != own[key].get("default")}
        return f"`{_yaml(default)}`" if default else "see its keys"
    return f"`{_yaml(default)}`"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False).removesuffix("\n").removesuffix("\n...")


def _type(value: dict) -> str:
    if names := _references(value):
        return "section" if len(names) == 1 else "section, by its `kind`"
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_type(one) for one in value["anyOf"]))
    kind = value.get("type")
    if kind == "array":
        items = value.get("prefixItems")
        return f"{len(items)} numbers" if items else f"list of {_type(value['items'])}"
    words = {"object": "mapping", "boolean": "true or false", "string": "text", "number": "number", "integer": "whole number"}
    return words.get(kind, kind) + _range(value)


def _range(value: dict) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {value[key]:g}" for key, sign in words.items() if key in value and value[key] < 1 << 60]
    return f", {' and '.join(found)}" if found else ""
