"""Ground truth of ImageNet's validation images, and the names of its classes."""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_tools.archive import contents

WNID = re.compile(r"n\d{8}")
DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
"""In the devkit: line k is the ILSVRC2012 id, 1 to 1000, of image k. WordNet ids are read too."""
SYNSETS = ("meta.mat", "map_clsloc.txt")
"""The WordNet id of each ILSVRC2012 id; the second has lines of WordNet id, ILSVRC2012 id and name."""
KAGGLE = "LOC_val_solution.csv"
"""From Kaggle: a header, then lines of image and "WordNet id and box"."""
KAGGLE_WORDS = "LOC_synset_mapping.txt"
"""From Kaggle: lines of WordNet id and name."""
MOST_BYTES = 64 << 20

Read = Callable[[str], bytes | None]
"""The content of the file of this name, or None if there is none."""


class Truth(NamedTuple):
    val: dict[str, str]
    """The WordNet id of each validation image, by its file name without extension."""
    words: dict[str, str]
    """Names of the classes by WordNet id; empty if no file has them."""


def find_truth(source: Path) -> Truth:
    """The ground truth in `source`: of the devkit (archive or folder), or of the files above. Raises ValueError for damage."""
    read, where = _reader(source)
    content, words, wnids = read(GROUND_TRUTH), {}, {}
    for name in SYNSETS:
        if found := read(name):
            wnids, words = (_meta if name == "meta.mat" else _map)(found, f"{where}: {name}")
            break
    if content is None:
        solution, named = read(KAGGLE), read(KAGGLE_WORDS)
        if named and not words:
            words = _kaggles_words(named, f"{where}: {KAGGLE_WORDS}")
        return Truth(_kaggle(solution, f"{where}: {KAGGLE}") if solution else {}, words)
    return Truth(_ground_truth(content, wnids, f"{where}: {GROUND_TRUTH}"), words)


def _reader(source: Path) -> tuple[Read, Path]:
    archive = source / f"{DEVKIT}.tar.gz"
    if archive.is_file():
        return contents(archive, (GROUND_TRUTH, *SYNSETS), MOST_BYTES, "download it again").get, archive
    folders = [source, source / DEVKIT / "data", source / "data", source / DEVKIT]

    def read(name: str) -> bytes | None:
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        return path.read_bytes() if path else None

    return read, source


def _meta(content: bytes, where: str) -> tuple[dict[int, str], dict[str, str]]:
    """WordNet id by ILSVRC2012 id, and name by WordNet id, from the devkit's MATLAB file. Reading one executes nothing."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(f"{where}: a MATLAB file, which needs SciPy: pip install 'dnal-dist[demo]'") from None
    try:
        rows = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        found = [
            (int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"]))
            for row in rows.reshape(-1)
            # Rows with children are groups of classes.
            if int(row["num_children"]) == 0
        ]
    except Exception as error:  # of many kinds, where the file is damaged
        raise ValueError(f"{where}: not the devkit's table of classes ({error}); download it again") from None
    return _unique(found, where)


def _map(content: bytes, where: str) -> tuple[dict[int, str], dict[str, str]]:
    found = []
    for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        wnid, identity, name = (*line.split(maxsplit=2), "", "")[:3]
        if not WNID.fullmatch(wnid) or not identity.isdecimal():
            raise ValueError(f"{where}: line {number}: expected WordNet id, ILSVRC2012 id and name, found {line[:60]!r}")
        found.append((int(identity), wnid, name.replace("_", " ") or wnid))
    return _unique(found, where)


def _unique(found: list[tuple[int, str, str]], where: str) -> tuple[dict[int, str], dict[str, str]]:
    if not found or len({identity for identity, *_ in found}) != len(found) or len({wnid for _, wnid, _ in found}) != len(found):
        raise ValueError(f"{where}: names no class, or one twice; download it again")
    if wrong := [wnid for _, wnid, _ in found if not WNID.fullmatch(wnid)]:
        raise ValueError(f"{where}: {wrong[0]!r} is no WordNet id; download it again")
    return {identity: wnid for identity, wnid, _ in found}, {wnid: name for _, wnid, name in found}


def _ground_truth(content: bytes, wnids: dict[int, str], where: str) -> dict[str, str]:
    found = {}
    for number, line in enumerate(content.decode(errors="replace").split(), 1):
        if WNID.fullmatch(line):
            wnid = line
        elif not wnids:
            raise ValueError(f"{where}: ids of classes, but neither meta.mat nor map_clsloc.txt to look them up; add one")
        elif not line.isdecimal() or int(line) not in wnids:
            raise ValueError(f"{where}: line {number}: {line[:60]!r} is none of the {len(wnids)} classes; download it again")
        else:
            wnid = wnids[int(line)]
        found[f"ILSVRC2012_val_{number:08d}"] = wnid
    return found


def _kaggle(content: bytes, where: str) -> dict[str, str]:
    found = {}
    try:
        rows = list(csv.reader(io.StringIO(content.decode(errors="replace"))))
    except csv.Error as error:
        raise ValueError(f"{where}: not a table ({error}); download it again") from None
    for number, row in enumerate(rows, 1):
        if number == 1 or not row:
            continue
        wnid = row[1].partition(" ")[0] if len(row) > 1 else ""
        if not WNID.fullmatch(wnid):
            raise ValueError(f"{where}: line {number}: expected an image and its WordNet id, found {','.join(row)[:60]!r}")
        found[row[0]] = wnid
    return found


def _kaggles_words(content: bytes, where: str) -> dict[str, str]:
    found = {}
    for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        wnid, _, name = line.strip().partition(" ")
        if wnid and not WNID.fullmatch(wnid):
            raise ValueError(f"{where}: line {number}: expected WordNet id and name, found {line[:60]!r}")
        if wnid:
            found[wnid] = name.strip() or wnid
    return found
