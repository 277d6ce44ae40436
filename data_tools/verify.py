"""Check webdataset shards against their index, and say what is in them.

  python -m data_tools.verify data/imagenet                              digests, samples, labels, duplicates
  python -m data_tools.verify data/imagenet --decode                     every image is decoded too
  python -m data_tools.verify data/imagenet --contact-sheet sheet.png    64 images with their labels, to look at
  python -m data_tools.verify '/data/own/train-*.tar' --json

Every sample is read as training reads it. Reported are shards that are missing or not what index.json says, samples that training
would skip, labels outside the classes, folders that name the classes otherwise, keys that a split has twice, and images that are,
byte for byte, in two splits or under two labels. The exit status is 0 if nothing was found, 1 if something was, 2 if the check or
the contact sheet failed.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_tools import findings
from data_tools.contact_sheet import contact_sheet, refuse_no_place
from data_tools.findings import Finding
from data_tools.index import are_numbers, find, folder_of, survey
from data_tools.make_shards import count
from data_tools.workers import cores
from dnal_dist.data import remote
from dnal_dist.data.shardlist import Url, read_index

LISTED = 10


def check(patterns: list[str], workers: int = 1, decode: bool = False) -> tuple[dict[str, Any], list[Finding], list, list[str]]:
    """Summary of each split, findings, surveys, and the names of the classes. Raises ValueError or OSError."""
    paths = find(patterns)
    folders = dict.fromkeys(path.parent for path in paths)
    indices = {folder: read_index(folder) for folder in folders}
    # A folder as a whole must hold all that its index tells of; of a pattern nobody can say.
    whole = {folder_of(one) for one in patterns}
    there = {str(path) for path in paths}
    listed = [f"{folder}/{name}" for folder in folders if folder in whole for name in indices[folder]]
    missing = [path for path in listed if path not in there]
    surveys = survey(paths, workers, decode)
    names = _names(folder for folder in folders if indices[folder])
    classes, splits = _classes(names), findings.by_split(surveys)
    known = {path: indices[path.parent].get(path.name) for path in paths}
    found = [
        *findings.of_shards(surveys, known, missing),
        *findings.of_names(names),
        *findings.of_labels(splits, classes),
        *findings.of_duplicates(splits),
    ]
    return findings.summary(splits, classes), found, surveys, classes or []


def _names(folders: Iterable[Path | Url]) -> dict[str, list[str]]:
    """The names of the classes that each of the folders' indices has."""
    found = {}
    for folder in folders:
        content = remote.read(f"{folder}/index.json") if isinstance(folder, Url) else (folder / "index.json").read_bytes()
        names = json.loads(content).get("classes")
        if isinstance(names, list) and names:
            found[f"{folder}/index.json"] = [str(name) for name in names]
    return found


def _classes(names: dict[str, list[str]]) -> list[str] | None:
    """From the first index that has names; numbers, of which a folder without the last classes has fewer, are the second choice."""
    true = [found for found in names.values() if not are_numbers(found)]
    return true[0] if true else max(names.values(), key=len, default=None)


def main() -> None:
    options = _arguments()
    try:
        if options.contact_sheet:
            # Before hours of reading, not after them.
            refuse_no_place(options.contact_sheet)
        summary, found, surveys, classes = check(options.patterns, options.workers, options.decode)
        if options.json:
            print(json.dumps({"splits": summary, "findings": [one._asdict() for one in found]}, indent=1))
        else:
            _print(summary, found, options.list)
        if options.contact_sheet:
            contact_sheet(surveys, classes, options.contact_sheet, options.seed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped before all shards were read", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if found else 0)


def _spread(spread: tuple[int, float, int] | None) -> str:
    return f"{spread[0]:,} / {spread[1]:,.0f} / {spread[2]:,}" if spread else "-"


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _number(value: int) -> str:
    return f"{value:,}"


SHOWN: dict[str, Callable[[Any], str]] = {
    "shards": _number,
    "samples": _number,
    "bytes": _size,
    "classes": _number,
    "per_class": _spread,
    "width": _spread,
    "height": _spread,
    "faulty": _number,
    "same_picture": _number,
}


def _print(summary: dict[str, Any], found: list[Finding], listed: int) -> None:
    console, table = Console(soft_wrap=True), Table("")
    for split in summary:
        table.add_column(escape(split), justify="right")
    for name, shown in SHOWN.items():
        if any(row[name] is not None for row in summary.values()):
            table.add_row(name.replace("_", " "), *(shown(row[name]) for row in summary.values()))
    console.print(table)
    for kind, number in Counter(one.kind for one in found).items():
        of_kind = [one for one in found if one.kind == kind]
        for one in of_kind[:listed]:
            console.print(f"{one.kind}: {one.where}: {one.what}", markup=False, highlight=False)
        if number > listed:
            console.print(f"{kind}: and {number - listed:,} more", markup=False, highlight=False)
    console.print("nothing was found" if not found else f"{len(found):,} findings", highlight=False)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="folder or shards, by patterns as in data.train of a recipe")
    parser.add_argument("--decode", action="store_true", help="decode every image, and tell their sizes")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="write an image of 64 samples drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, help="of the contact sheet's samples (%(default)s)")
    parser.add_argument("--list", type=count, default=LISTED, metavar="N", help="most findings of a kind to print (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument("--workers", type=count, default=cores(), metavar="N", help="processes (all cores, here %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
