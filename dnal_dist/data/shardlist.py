"""The shard list: paths and URLs that a recipe's patterns stand for, and the index beside them."""

import functools
import glob
import itertools
import json
import os
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from dnal_dist.common.errors import InputError, reason
from dnal_dist.common.files import read_regular
from dnal_dist.common.paths import expanded
from dnal_dist.data import remote

MOST_SHARDS = 100_000
MOST_CLASSES = 1 << 20


class Url(str):
    """URL of a remote shard or its folder, with the attributes of Path that are used here."""

    @property
    def name(self) -> str:
        return self.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        return Url(self.rpartition("/")[0])


def expand(patterns: str, key: str) -> tuple[list[str], list[Path | Url]]:
    """The paths and path patterns that `patterns` stands for once its braces are expanded, and the files they match.

    Raises InputError, naming the recipe's `key`, for a pattern that matches nothing or would run a program.
    """
    names, paths = [], []
    for pattern in _words(patterns, key):
        # A variable may hold the beginning of a URL.
        pattern = expanded(pattern, f"key '{key}': ")
        if any("**" in part and part != "**" for part in pattern.split("/")):
            raise InputError(f"key '{key}': {pattern}: ** stands alone between slashes, as in folder/**/*.tar; correct it")
        is_remote = remote.check(pattern, key)
        each = _braces(pattern, key)
        if not is_remote:
            each = [_literal(one) for one in each]
        found = {one: _matches(one, is_remote, key) for one in each}
        # A shard that is named in full must be there; of a pattern with wildcards, one match is enough.
        missing = [one for one in each if not found[one] and not glob.has_magic(one)]
        if missing or not any(found.values()):
            one = missing[0] if missing else pattern
            brackets = "; [ and ] are a wildcard for one character, [[] is a bracket itself" if "[" in one else ""
            raise InputError(
                f"key '{key}': no shard matches {one!r}; make shards with "
                f"`python -m data_tools.make_shards` (for the demo: `python -m data_tools.make_shards digits data/digits`) "
                f"or correct the pattern (a path with blanks wants quotes of its own{brackets})"
            )
        names += each
        paths += [path for one in each for path in found[one]]
    if not paths:
        raise InputError(f"key '{key}': expected the path of shards, found {patterns!r}")
    real = [path if isinstance(path, Url) else os.path.realpath(path) for path in paths]
    if len(set(real)) < len(real):
        twice = next(path for i, path in enumerate(paths) if real[i] in real[:i])
        raise InputError(f"key '{key}': {twice} is named twice, and its samples would be; name it once")
    return names, paths


def _braces(pattern: str, key: str) -> list[str]:
    """The patterns without braces that `pattern` stands for."""
    try:
        # The library makes a whole range before the first of its names.
        ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?\d+)?\}", pattern)
        many = pattern.count("{") > 100 or any(abs(int(end) - int(begin)) >= MOST_SHARDS for begin, end in ranges)
        each = [] if many else list(itertools.islice(braceexpand(pattern), MOST_SHARDS + 1))
    except (ValueError, RecursionError) as error:
        raise InputError(f"key '{key}': {pattern!r:.200} is not a pattern ({reason(error)}); correct it") from None
    if many or len(each) > MOST_SHARDS:
        raise InputError(f"key '{key}': {pattern!r:.200} has braces for more than {MOST_SHARDS:,} shards; correct them")
    return each


def _literal(pattern: str) -> str:
    """The pattern with brackets that stand for themselves, if it matches something only so, as with a folder called [2024]."""
    escaped = pattern.replace("[", "[[]")
    if "[" in pattern and not _glob(pattern) and _glob(escaped):
        return escaped if glob.has_magic(pattern.replace("[", "")) else glob.escape(pattern)
    return pattern


def _glob(pattern: str) -> list[str]:
    """What matches, sorted; ** is any number of folders, as in a shell."""
    return sorted(glob.glob(pattern, recursive=True))


def _matches(pattern: str, is_remote: bool, key: str) -> list[Path | Url]:
    """The files, sorted. A remote shard that is named in full is taken to be there; its index or reading it shows otherwise."""
    if not is_remote:
        return [Path(path) for path in _glob(pattern)]
    if not glob.has_magic(pattern):
        return [Url(pattern)]
    folder = Url(pattern).parent
    if glob.has_magic(folder) and not remote.can_list(pattern):
        raise InputError(f"key '{key}': {pattern}: no wildcard in a folder over http, which cannot list; name each with {{a,b}}")
    try:
        return [Url(f"{folder}/{file}") for file in sorted(read_index(folder)) if fnmatch(f"{folder}/{file}", pattern)]
    except InputError:
        if not remote.can_list(pattern):
            raise
    try:
        return [Url(url) for url in remote.glob(pattern)]
    except OSError as error:
        raise InputError(f"key '{key}': {error}") from None


def _words(patterns: str, key: str) -> list[str]:
    try:
        return shlex.split(patterns)
    except ValueError as error:
        raise InputError(f"key '{key}': {patterns!r} cannot be divided into patterns ({error}); mend its quotes") from None


def refuse_gaps(indices: dict[Path | Url, dict[str, dict]], names: list[str], paths: list[Path | Url]) -> None:
    """Raise InputError if an index lists a shard that `names` matches and that is not there."""
    there, patterns = set(paths), [os.path.normpath(name).replace("**/", "*") for name in names]
    for folder, index in indices.items():
        if isinstance(folder, Url):
            continue
        for path in (folder / file for file in index):
            if path not in there and any(fnmatch(str(path), pattern) for pattern in patterns):
                raise InputError(f"{path}: no such shard, but index.json lists it; copy it here or make the index again")


def read_index(folder: Path | Url) -> dict[str, dict]:
    """Entries of folder/index.json by the shard's name; {} if there is none. Raises InputError if it is damaged."""
    try:
        content = index_content(folder)
        return {entry["file"]: _entry(entry) for entry in content["shards"]}
    except FileNotFoundError:
        return {}
    except InputError:
        raise
    except remote.RemoteError as error:
        raise InputError(
            f"{error}; remote shards need their index: make it by `python -m data_tools.index`, and put it beside them"
        ) from None
    except Exception as error:  # of many kinds, for what JSON may hold
        why = " ".join(repr(error).split())[:300]
        raise InputError(f"{folder}/index.json: not an index of shards ({why}); remove it or make it again") from None


def index_content(folder: Path | Url):
    """What the index holds. Raises InputError, OSError, ValueError or RecursionError."""
    where = f"{folder}/index.json"
    return json.loads(remote_index(where) if isinstance(folder, Url) else read_regular(Path(where), remote.MOST_WHOLE))


@functools.lru_cache(8)
def remote_index(url: str) -> bytes:
    """Each pattern and each split needs it; in the life of a process it does not change."""
    return remote.read(url)


def _entry(entry: dict) -> dict:
    """One checked entry of an index. Raises ValueError or TypeError."""
    samples, size, offsets = int(entry["samples"]), int(entry["bytes"]), entry.get("offsets")
    if not isinstance(entry["file"], str) or "/" in entry["file"] or not entry["file"].isprintable():
        raise ValueError(f"{entry['file']!r}, which is not the name of a file")
    if not re.fullmatch("[0-9a-fA-F]{64}", str(entry.get("sha256") or "0" * 64)):
        raise ValueError(f"a digest of {entry['file']} that is not SHA-256")
    if samples < 0:
        raise ValueError("a negative number of samples")
    if offsets is not None:
        ends = np.array(offsets)
        rising = ends.dtype == np.int64 and ends.ndim == 1 and (ends[1:] > ends[:-1]).all()
        if not rising or len(ends) != samples + 1 or ends[0] < 0 or ends[-1] > size:
            raise ValueError(f"offsets of {entry['file']} that are not those of {samples} samples in {size} bytes")
    if (labels := entry.get("labels")) is not None:
        labels = np.array(labels, dtype=None if labels else np.int64)
        if labels.shape != (samples,) or labels.dtype != np.int64 or not ((labels >= -1) & (labels < MOST_CLASSES)).all():
            raise ValueError(f"labels of {entry['file']} that are not those of {samples} samples")
        labels = labels.astype(np.int32)
    return {"samples": samples, "bytes": size, "offsets": offsets, "sha256": entry.get("sha256"), "labels": labels}
