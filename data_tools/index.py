"""Write index.json for webdataset shards that were made elsewhere.

  python -m data_tools.index /data/own                                       all shards (*.tar) in a folder and below it
  python -m data_tools.index '/data/own/train-{000000..000146}.tar'          some of them
  python -m data_tools.index /data/own --classes names.txt --workers 16      with the names of the classes, one a line
  python -m data_tools.index /data/own --label-key label                     labels in .json members, under this key
  python -m data_tools.index /data/own --image crop2.png --label cls         which members, where samples have several
  python -m data_tools.index 's3://BUCKET/own/{000..146}.tar' --output index.json     copy it beside the shards

The index holds, for each shard, the number of samples, the byte at which each begins, and the SHA-256. Without one a training reads
all headers at its start, and cannot tell a damaged copy from a whole one. Every sample is read as training reads it: an image (.png
.jpg .jpeg .webp .bmp .tif .tiff, in any case) and a label (.cls, .cls.txt or .txt; a class's number, or its name with --classes).
Samples that training would skip are counted and named here, and stay in the index: training skips and counts them too. Members of
other kinds are listed once, by kind.
"""

import argparse
import glob
import shlex
import sys
from pathlib import Path

from data_tools.survey import Survey, Surveyor, unread_line
from data_tools.workers import in_order
from data_tools.writing import write_index
from dnal_dist.common.cores import cores
from dnal_dist.common.door import argument, door, parser_of, whole
from dnal_dist.common.errors import InputError
from dnal_dist.common.files import read_regular
from dnal_dist.common.paths import expanded
from dnal_dist.common.text import printable
from dnal_dist.data.classes import are_numbers, class_names, class_numbers
from dnal_dist.data.samples import ANY_FORMAT, SampleFormat
from dnal_dist.data.shardlist import Url, expand, index_content, read_index

LISTED = 10
MOST_NAMES = 64 << 20


def folder_of(one: str) -> Path | Url | None:
    """The folder that `one` names; None for a shard or a pattern of shards. Raises ValueError for a variable that is not set."""
    one = expanded(one)
    if "://" in one:
        return None if one.endswith(".tar") or glob.has_magic(one) else Url(one.rstrip("/"))
    return Path(one) if Path(one).is_dir() else None


def find(patterns: list[str]) -> list[Path | Url]:
    """The shards in folders and below them, and of patterns, in order and once each. Raises ValueError if one matches nothing."""
    wanted = []
    for one in patterns:
        folder = folder_of(one)
        below = "*.tar" if isinstance(folder, Url) else "**/*.tar"
        wanted.append(f"{folder if isinstance(folder, Url) else glob.escape(str(folder))}/{below}" if folder else one)
    return list(dict.fromkeys(expand(shlex.join(wanted), "PATTERN")[1]))


def survey(
    paths: list[Path | Url], workers: int, names: dict[Path | Url, list[str]], form: SampleFormat, decode: bool = False
) -> list[Survey]:
    """Surveys of all shards. names: of the classes, by folder. Raises OSError or ValueError."""
    total = None if any(isinstance(path, Url) for path in paths) else sum(path.stat().st_size for path in paths)
    forms = {folder: form._replace(names=class_numbers(found)) for folder, found in names.items()}
    return in_order(Surveyor(forms, decode), paths, workers, "bytes read", total)


def make(
    paths: list[Path | Url], classes: Path | None, output: Path | None, workers: int, form: SampleFormat = ANY_FORMAT
) -> list[Survey]:
    """Write the index of these shards to `output`, or beside them. An existing index keeps its entries of other shards, and its
    names of the classes unless the file `classes` has others.

    Raises ValueError or OSError.
    """
    new_names = read_names(classes) if classes else []
    folders = {path.parent: [] for path in paths}
    if odd := next((path for path in paths if not path.name.isprintable()), None):
        raise ValueError(f"{odd}: its name has control characters, which no index may hold; rename it")
    if output and len(folders) > 1:
        raise ValueError(f"--output: one index for the shards of {len(folders)} folders; index each of them by itself")
    if not output and (away := next((folder for folder in folders if isinstance(folder, Url)), None)):
        raise ValueError(f"{away}: no index can be written there; write it with --output index.json and copy it beside the shards")
    known = {folder: ([], []) if output else _known(folder, set(paths)) for folder in folders}
    found = survey(paths, workers, {folder: new_names or names for folder, (_, names) in known.items()}, form)
    if empty := next((one for one in found if not one.entry["samples"]), None):
        reason = empty.damage[0][1] if empty.damage else "it holds no sample"
        raise ValueError(f"{empty.path}: not a shard ({reason}); leave it out")
    highest = max((good.label for one in found for good in one.good), default=0)
    for one in found:
        folders[one.path.parent].append(one.entry)
        where, names = (classes, new_names) if classes else (one.path.parent / "index.json", known[one.path.parent][1])
        if names and not are_numbers(names):
            _refuse_unnamed(one, names, where)
    for folder, entries in folders.items():
        others, names = known[folder]
        new = {entry["file"] for entry in entries}
        others = [entry for entry in others if entry["file"] not in new]
        if are_numbers(names):
            # They count the classes of shards that are not read now.
            names = list(map(str, range(max(1 + highest, len(names) if others else 0))))
        write_index(
            output or folder / "index.json", sorted([*entries, *others], key=lambda entry: entry["file"]), new_names or names
        )
    return found


def _refuse_unnamed(one: Survey, names: list[str], where: Path) -> None:
    if wrong := next((good for good in one.good if good.label >= len(names)), None):
        raise ValueError(
            f"{where}: names {len(names)} classes, but {one.path}: {wrong.key} has label {wrong.label}; give a file with a "
            f"line for each class by --classes, or leave the shard out"
        )


def _known(folder: Path, paths: set[Path | Url]) -> tuple[list[dict], list[str]]:
    """Entries of an existing index for shards that exist, and its names of the classes."""
    where = folder / "index.json"
    try:
        if not read_index(folder):
            return [], []
    except ValueError as error:
        if _is_foreign(folder):
            raise ValueError(f"{where}: of another program; rename it, since an index of shards has this name") from None
        if not set(folder.glob("*.tar")) <= paths:
            raise ValueError(f"{error}, from all shards of the folder") from None
        print(f"{where}: damaged, and made again", file=sys.stderr)
        return [], []
    there = [entry for entry in index_content(folder)["shards"] if (folder / entry["file"]).is_file()]
    return there, class_names(folder)


def _is_foreign(folder: Path) -> bool:
    """Whether folder/index.json is whole JSON, but not an index."""
    try:
        content = index_content(folder)
    except (ValueError, RecursionError):
        return False
    return not isinstance(content, dict) or "shards" not in content


def read_names(path: Path) -> list[str]:
    """The names of the classes, one a line. Raises ValueError if there are none, or a line between two of them is empty."""
    try:
        names = [line.strip() for line in read_regular(path, MOST_NAMES).decode("utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (at byte {error.start}); convert it, for example with iconv") from None
    if not names[-1]:
        raise ValueError(f"{path}: holds no name, expected one class a line")
    if "" in names:
        raise ValueError(f"{path}: line {1 + names.index('')} is empty, which would shift the numbers of later classes; remove it")
    return names


@door
def main() -> None:
    options = _arguments()
    try:
        found = make(find(options.patterns), options.classes, options.output, options.workers, form_of(options))
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None
    except KeyboardInterrupt:
        print("\nstopped; no index was written", file=sys.stderr)
        sys.exit(130)
    wrong = [f"{one.path}: at byte {byte}: {reason}" for one in found for byte, reason in one.damage]
    wrong += [f"{one.path}: sample {key}: {reason}" for one in found for key, reason in one.faults]
    more = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
    for line in [*wrong[:LISTED], *more, *filter(None, [unread_line(found)])]:
        print(printable(line), file=sys.stderr)
    faulty = f"; {sum(len(one.faults) for one in found)} of them will be skipped" if any(one.faults for one in found) else ""
    print(f"{len(found)} shards, {sum(one.entry['samples'] for one in found)} samples{faulty}")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of both readers of shards, index and verify."""
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="folder or shards, by patterns as in data.train of a recipe")
    parser.add_argument("--image", metavar="EXTENSION", help="extension of the image, as data.image of a recipe, such as crop2.png")
    parser.add_argument("--label", metavar="EXTENSION", help="extension of the label, as data.label of a recipe")
    parser.add_argument("--label-key", metavar="KEY", help="key of the label in .json members, as data.label_key of a recipe")
    parser.add_argument("--workers", type=whole(), default=cores(), metavar="N", help="processes (all cores, here %(default)s)")


def form_of(options: argparse.Namespace) -> SampleFormat:
    return SampleFormat(json_key=options.label_key, image=options.image, label=options.label)


def _arguments() -> argparse.Namespace:
    parser = parser_of("data_tools.index", __doc__)
    add_common_arguments(parser)
    parser.add_argument("--classes", type=argument, metavar="FILE", help="names of the classes, one a line (else their numbers)")
    parser.add_argument("--output", type=argument, metavar="FILE", help="path of the index, if not index.json beside the shards")
    return parser.parse_args()


if __name__ == "__main__":
    main()
