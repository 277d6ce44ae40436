"""Check webdataset shards against their index, and report their content.

  python -m data_tools.verify data/imagenet                              digests, samples, labels, duplicates
  python -m data_tools.verify data/imagenet --decode                     every image is decoded too
  python -m data_tools.verify data/imagenet --contact-sheet sheet.png    64 images with their labels, to look at
  python -m data_tools.verify /data/own --label-key label                labels in .json members, under this key
  python -m data_tools.verify '/data/own/train-*.tar' --json

Every sample is read as training reads it. Findings are: shards that are missing or differ from index.json, samples that training
would skip, labels outside the classes, folders with other names for the classes, keys that a split has twice, and images that are,
byte for byte, in two splits or under two labels. Members without a reader are listed once, by kind, and so are splits with ten
times as many samples of one class as of another. The mean and std that are printed suit a network that begins with random weights;
published weights want their own. Folders are taken with all below them. The exit status is 0 without
findings, 1 with findings, 2 if the check or the contact sheet failed.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_tools import findings
from data_tools.contact_sheet import contact_sheet, refuse_unwritable
from data_tools.findings import Finding
from data_tools.index import add_common_arguments, find, folder_of, form_of, survey
from data_tools.survey import Survey, unread_line
from dnal_dist.common.door import argument, door, parser_of, whole
from dnal_dist.common.errors import InputError
from dnal_dist.common.text import printable, short
from dnal_dist.data.classes import are_numbers, class_names, conflicts
from dnal_dist.data.samples import ANY_FORMAT, SampleFormat
from dnal_dist.data.shardlist import Url, read_index

LISTED = 10


def check(
    patterns: list[str], workers: int = 1, decode: bool = False, form: SampleFormat = ANY_FORMAT
) -> tuple[dict[str, Any], list[Finding], list[Survey], list[str]]:
    """Summary of each split, findings, surveys, and the names of the classes. Raises ValueError or OSError."""
    paths = find(patterns)
    folders = dict.fromkeys(path.parent for path in paths)
    indices = {folder: read_index(folder) for folder in folders}
    # A whole folder must hold all shards of its index; a pattern need not match all.
    whole = {folder for folder in folders for one in patterns if _is_in(folder, folder_of(one))}
    there = {str(path) for path in paths}
    listed = [f"{folder}/{name}" for folder in folders if folder in whole for name in indices[folder]]
    missing = [path for path in listed if path not in there]
    by_folder = {folder: class_names(folder) for folder in folders}
    surveys = survey(paths, workers, by_folder, form, decode)
    names = {f"{folder}/index.json": found for folder, found in by_folder.items() if found}
    classes, splits = _classes(names), findings.by_split(surveys)
    known = {path: indices[path.parent].get(path.name) for path in paths}
    found = [
        *findings.shard_findings(surveys, known, missing),
        *(Finding("class", *one) for one in conflicts(names)),
        *findings.label_findings(splits, classes),
        *findings.duplicate_findings(splits),
    ]
    return findings.summary(splits, classes), found, surveys, classes or []


def _is_in(folder: Path | Url, whole: Path | Url | None) -> bool:
    return folder == whole or (isinstance(folder, Path) and isinstance(whole, Path) and whole in folder.parents)


def _classes(names: dict[str, list[str]]) -> list[str] | None:
    """Names of the classes from the first index that has any; else the most numbers, since a folder may lack the last classes."""
    given = [found for found in names.values() if not are_numbers(found)]
    return given[0] if given else max(names.values(), key=len, default=None)


@door
def main() -> None:
    options = _arguments()
    try:
        if options.contact_sheet:
            # Before hours of reading.
            refuse_unwritable(options.contact_sheet)
        summary, found, surveys, classes = check(options.patterns, options.workers, options.decode, form_of(options))
        colours = findings.colours(findings.by_split(surveys))
        if options.json:
            content = {"splits": summary, "findings": [one._asdict() for one in found], "colours": colours}
            print(json.dumps(content, indent=1))
        else:
            notes = [*findings.balance(summary, classes), *filter(None, [unread_line(surveys)])]
            if colours is not None:
                notes.append("for a recipe's data, of {2:,} training images: mean: {0}, std: {1}".format(*colours))
            _print(summary, found, notes, options.list)
        if options.contact_sheet:
            contact_sheet(surveys, classes, options.contact_sheet, options.seed)
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None
    except KeyboardInterrupt:
        print("\nstopped before all shards were read", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if found else 0)


def _as_spread(spread: tuple[int, float, int] | None) -> str:
    return f"{spread[0]:,} / {spread[1]:,.0f} / {spread[2]:,}" if spread else "-"


ROWS = ("shards", "samples", "bytes", "classes", "per_class", "width", "height", "faulty", "same_picture", "with_alpha")
FORMS: dict[str, Callable[[Any], str]] = {"bytes": short, **dict.fromkeys(("per_class", "width", "height"), _as_spread)}


def _print(summary: dict[str, Any], found: list[Finding], notes: list[str], listed: int) -> None:
    console, table = Console(soft_wrap=True), Table("")
    for split in summary:
        table.add_column(escape(printable(split)), justify="right")
    for name in ROWS:
        if any(row[name] is not None for row in summary.values()):
            table.add_row(name.replace("_", " "), *(FORMS.get(name, "{:,}".format)(row[name]) for row in summary.values()))
    console.print(table)
    for note in notes:
        console.print(printable(note), markup=False, highlight=False)
    for kind, number in Counter(one.kind for one in found).items():
        for one in [one for one in found if one.kind == kind][:listed]:
            console.print(printable(f"{one.kind}: {one.where}: {one.what}"), markup=False, highlight=False)
        if number > listed:
            console.print(f"{kind}: and {number - listed:,} more", markup=False, highlight=False)
    console.print("nothing was found" if not found else f"{len(found):,} findings", highlight=False)


def _arguments() -> argparse.Namespace:
    parser = parser_of("data_tools.verify", __doc__)
    add_common_arguments(parser)
    parser.add_argument("--decode", action="store_true", help="decode every image, and report their sizes")
    parser.add_argument("--contact-sheet", type=argument, metavar="PNG", help="write an image of 64 samples drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the contact sheet's samples (%(default)s)")
    parser.add_argument("--list", type=whole(), default=LISTED, metavar="N", help="findings of a kind to print (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
