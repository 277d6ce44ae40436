"""Write index.json for webdataset shards that were made elsewhere.

  python -m data_tools.index /data/own                                       all shards (*.tar) of a folder
  python -m data_tools.index '/data/own/train-{000000..000146}.tar'          some of them
  python -m data_tools.index /data/own --classes names.txt --workers 16      with the names of the classes, one a line
  python -m data_tools.index 's3://BUCKET/own/{000..146}.tar' --output index.json     named in full; to be copied beside them

The index tells how many samples each shard holds, where each of them begins, and the shard's SHA-256; without one a training has to
read all headers at its start, and cannot tell a damaged copy from a whole one. Every sample is read as training reads it. Those it
would skip are counted and named here, and stay in the index: they are skipped and counted in training as well.
"""

import argparse
import glob
import json
import shlex
import sys
from pathlib import Path

from data_tools.make_shards import count
from data_tools.survey import Survey, Surveyor
from data_tools.workers import cores, in_order
from data_tools.writing import write_index
from dnal_dist.shards import Url, expand, read_index

LISTED = 10


def folder_of(one: str) -> Path | Url | None:
    """The folder that is meant by `one`, if it is not a shard or a pattern of shards."""
    if "://" in one:
        return None if one.endswith(".tar") or glob.has_magic(one) else Url(one.rstrip("/"))
    return Path(one) if Path(one).is_dir() else None


def find(patterns: list[str]) -> list[Path | Url]:
    """The shards that folders and patterns stand for, in order and once each. Raises ValueError if one matches nothing."""
    wanted = [f"{folder_of(one)}/*.tar" if folder_of(one) else one for one in patterns]
    return list(dict.fromkeys(expand(shlex.join(wanted), "PATTERN")[1]))


def survey(paths: list[Path | Url], workers: int, decode: bool = False) -> list[Survey]:
    """Every shard, read as training reads it. Raises OSError or ValueError."""
    total = None if any(isinstance(path, Url) for path in paths) else sum(path.stat().st_size for path in paths)
    return in_order(Surveyor(decode), paths, workers, "bytes read", total)


def make(paths: list[Path | Url], classes: list[str] | None, output: Path | None, workers: int) -> list[Survey]:
    """Write the index of these shards to `output`, or beside them; what an index there says of other shards then stays.

    Raises ValueError or OSError.
    """
    folders = {path.parent: [] for path in paths}
    if output and len(folders) > 1:
        raise ValueError(f"--output: one index for the shards of {len(folders)} folders; index each of them by itself")
    if not output and (away := next((folder for folder in folders if isinstance(folder, Url)), None)):
        raise ValueError(f"{away}: no index can be written there; write it with --output index.json and copy it beside the shards")
    known = {folder: ([], []) if output else _known(folder) for folder in folders}
    found = survey(paths, workers)
    if empty := next((one for one in found if not one.entry["samples"]), None):
        reason = empty.damage[0][1] if empty.damage else "it holds no sample"
        raise ValueError(f"{empty.path}: not a shard ({reason}); leave it out")
    for one in found:
        folders[one.path.parent].append(one.entry)
    for folder, entries in folders.items():
        others, names = known[folder]
        new = {entry["file"] for entry in entries}
        entries = sorted([*entries, *(entry for entry in others if entry["file"] not in new)], key=lambda entry: entry["file"])
        names = classes or names or list(map(str, range(1 + max((g.label for one in found for g in one.good), default=0))))
        write_index(output or folder / "index.json", entries, names)
    return found


def _known(folder: Path) -> tuple[list[dict], list[str]]:
    """What an index in `folder` says already of shards that are there, and its names of classes."""
    if not read_index(folder):
        return [], []
    content = json.loads((folder / "index.json").read_text())
    there = [entry for entry in content["shards"] if (folder / entry["file"]).is_file()]
    return there, [str(name) for name in content.get("classes", [])]


def read_names(path: Path) -> list[str]:
    """The names of the classes, one a line. Raises ValueError if there are none."""
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path}: holds no name, expected one class a line")
    return names


def main() -> None:
    options = _arguments()
    try:
        classes = read_names(options.classes) if options.classes else None
        found = make(find(options.patterns), classes, options.output, options.workers)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; no index was written", file=sys.stderr)
        sys.exit(130)
    wrong = [f"{one.path}: at byte {byte}: {reason}" for one in found for byte, reason in one.damage]
    wrong += [f"{one.path}: sample {key}: {reason}" for one in found for key, reason in one.faults]
    for line in wrong[:LISTED]:
        print(line, file=sys.stderr)
    if len(wrong) > LISTED:
        print(f"and {len(wrong) - LISTED} more", file=sys.stderr)
    faulty = f"; {sum(len(one.faults) for one in found)} of them will be skipped" if any(one.faults for one in found) else ""
    print(f"{len(found)} shards, {sum(one.entry['samples'] for one in found)} samples{faulty}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="folder or shards, by patterns as in data.train of a recipe")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line (else their numbers)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the index goes, if not beside the shards as index.json")
    parser.add_argument("--workers", type=count, default=cores(), metavar="N", help="processes (all cores, here %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
