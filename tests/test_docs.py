"""README, docs and recipes/README.md: commands, options, overrides, code, links and paths exist."""

import argparse
import ast
import contextlib
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dnal_dist import recipe
from dnal_dist.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [Path("README.md"), *sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md")), Path("recipes/README.md")]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")
# Words that stand for a name of the reader's own, and an example of it.
PLACEHOLDERS = {"RECIPE": "digits.yaml", "recipes/RECIPE": "recipes/digits.yaml", "OVERRIDE": "seed=1"}


def shell_blocks(text: str) -> list[str]:
    """Indented blocks, and fenced ones of sh or bash."""
    fenced = [block for language, block in FENCE.findall(text) if language in ("sh", "bash", "console")]
    lines = FENCE.sub("", text).splitlines()
    blocks, block = [], []
    for before, line in zip(["", *lines], [*lines, "end"], strict=False):
        if line.startswith("    ") and (block or not before.strip()):
            block.append(line[4:])
        elif block and not line.strip():
            block.append("")
        elif block:
            blocks.append("\n".join(block).strip())
            block = []
    return [*fenced, *blocks]


def logical_lines(block: str) -> list[str]:
    return [line for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip() and not line.lstrip().startswith("#")]


def commands() -> list[tuple[Path, list[str]]]:
    """Page and words of each command line: of shell blocks, and of `code` that begins with a command of this project."""
    found = []
    for page, text in TEXT.items():
        lines = [line for block in shell_blocks(text) for line in logical_lines(block)]
        spans = re.findall(r"(?<!`)`((?:python|dnal|accelerate) [^`]+)`", FENCE.sub("", text))
        for line in [*lines, *(" ".join(span.replace("\\|", "|").split()) for span in spans)]:
            with contextlib.suppress(ValueError):
                found.append((page, shlex.split(line, comments=True)))
    return found


def door_and_arguments(words: list[str]) -> tuple[str, list[str]] | None:
    """Module or script of this project, and its arguments."""
    if words[:1] == ["dnal"] and len(words) > 1 and words[1] != "COMMAND":
        assert words[1] in COMMANDS, f"dnal has no command {words[1]}"
        door = COMMANDS[words[1]][0]
        return "slurm/submit.py" if door == "submit" else door.removesuffix(".__main__"), words[2:]
    for at, word in enumerate(words[:-1]):
        if word == "-m" and words[at + 1].partition(".")[0] in ("dnal_dist", "data_tools"):
            return words[at + 1], words[at + 2 :]
    if len(words) > 1 and words[0].endswith("python") and words[1].endswith(".py"):
        return words[1], words[2:]
    return None


class Parsed(BaseException):
    """In place of parsing: the parser of a command."""


@pytest.fixture(scope="module")
def option_names() -> dict[str, set[str]]:
    """Option strings of each command that a page uses with options, of its own argparse parser."""
    used = [found for _, words in commands() if (found := door_and_arguments(words))]
    doors = {door for door, arguments in used if any(word.startswith("--") for word in arguments)}
    return {door: options_of(door) for door in sorted(doors)}


def options_of(door: str) -> set[str]:
    def stop(parser: argparse.ArgumentParser, *_, **__):
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stop)
        patch.setattr(sys, "argv", [door, "recipes/digits.yaml"])
        patch.setattr(sys, "path", [str((ROOT / door).parent), *sys.path])
        patch.chdir(ROOT)
        try:
            if door.endswith(".py"):
                runpy.run_path(str(ROOT / door), run_name="__main__")
            else:
                module = importlib.import_module(door)
                module = importlib.import_module(f"{door}.__main__") if hasattr(module, "__path__") else module
                module.main()
        except Parsed as parsed:
            return known_options(parsed.args[0])
    pytest.fail(f"{door} has no argparse parser")


def known_options(parser: argparse.ArgumentParser) -> set[str]:
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found |= known_options(inner)
    return found


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_shell_blocks_can_be_pasted(page):
    for block in shell_blocks(TEXT[page]):
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert done.returncode == 0, f"{page}: {done.stderr}\n{block}"
        for line in logical_lines(block):
            prose = re.search(r"\S\s{3,}(?!#)\S", line)
            assert prose is None, f"{page}: a comment inside a shell block begins with #, which is missing in: {line}"


def test_options_of_commands_exist(option_names):
    used = 0
    for page, words in commands():
        if (found := door_and_arguments(words)) is None:
            continue
        door, arguments = found
        for option in (word.partition("=")[0] for word in arguments if re.match(r"--[a-z]", word)):
            used += 1
            assert option in option_names[door], f"{page}: {door} has no option {option}"
    assert used > 30


def test_overrides_of_recipes_are_valid():
    checked = 0
    for _page, words in commands():
        words = [PLACEHOLDERS.get(word, word) for word in words]
        recipes = [word for word in words if re.fullmatch(r"recipes/\w+\.yaml", word)]
        overrides = [word for word in words if re.fullmatch(r"[a-z_]+(\.\w+)*=[^.].*", word) and "..." not in word]
        if recipes:
            recipe.load(str(ROOT / recipes[0]), overrides)
            checked += len(overrides)
    for name, override in re.findall(r"(?m)^## \[(\w+\.yaml)\].*?(?=^## |\Z)()", TEXT[Path("recipes/README.md")], re.DOTALL):
        section = TEXT[Path("recipes/README.md")].split(f"## [{name}]")[1].split("\n## ")[0]
        for override in re.findall(r"`([a-z_]+\.[\w.]+=[^`]+)`", section):
            recipe.load(str(ROOT / "recipes" / name), override.split())
            checked += 1
    assert checked > 30


def test_python_blocks_compile_and_import_what_exists():
    blocks = [(page, block) for page, text in TEXT.items() for language, block in FENCE.findall(text) if language == "python"]
    assert blocks
    for page, block in blocks:
        for node in ast.walk(ast.parse(block, filename=str(page))):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("dnal_dist", "data_tools"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}"), page


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_paths_exist(page):
    text = FENCE.sub("", TEXT[page])
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", text):
        if link.startswith(("http:", "https:")):
            continue
        target = page if not link else Path(*(page.parent / link).parts)
        assert (ROOT / target).exists(), f"{page}: no file {link}"
        if anchor:
            titles = re.findall(r"(?m)^#+ (.*)$", (ROOT / target).read_text(encoding="utf-8"))
            slugs = {re.sub(r"[^\w\- ]", "", re.sub(r"[`\[\]]|\(.*?\)", "", title).lower()).replace(" ", "-") for title in titles}
            assert anchor[1:] in slugs, f"{page}: no heading {anchor} in {target}"
    for path in re.findall(r"`((?:dnal_dist|data_tools|docs|tests|benchmarks|slurm|recipes)/[\w/.*-]*)`", TEXT[page]):
        assert list(ROOT.glob(path)) if "*" in path else (ROOT / path).exists(), f"{page}: no {path}"
    for module in re.findall(r"`((?:dnal_dist|data_tools)(?:\.\w+)+)[`(]", TEXT[page]):
        assert resolves(module), f"{page}: no {module}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute, None)
        return found is not None
    return False


def test_the_claim_of_the_readme_is_the_first_line_of_the_pareto_page():
    claim = TEXT[Path("docs/pareto.md")].split("\n\n")[1]
    assert len(claim) > 80 and f"\n{claim}\n" in TEXT[Path("README.md")]
