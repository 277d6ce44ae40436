"""Shards: which samples there are, where each of them lies, and any one of them.

index.json beside the shards holds where each sample begins, so a sample is read with one request and nothing is read before it.
"""

import functools
import glob
import io
import json
import os
import shlex
from collections import OrderedDict
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand

from dnal_dist import remote
from dnal_dist.ahead import Ahead, Need
from dnal_dist.cache import Cache
from dnal_dist.recipe import InputError
from dnal_dist.samples import BLOCK, Fault, Sample, boundaries, first_key, parse

OPEN_SHARDS = 64


class Origin(NamedTuple):
    """Where a sample of a batch is from: its name and position for the receipt; key, shard and byte for messages."""

    name: str
    position: int
    key: str
    shard: str
    offset: int

    def fault(self, reason: str) -> Fault:
        return Fault(reason, self.key, self.shard, self.offset)


class Url(str):
    """Where a remote shard or its folder is, with what of Path's is used here."""

    @property
    def name(self) -> str:
        return self.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        return Url(self.rpartition("/")[0])


class Shards:
    """The shards of one split, in the order of `patterns`; the samples of all of them are numbered through. Remote ones are read
    from copies in the folder `cache`, which holds at most `cache_gb` GB.

    Raises InputError if there are none, or if they are not what index.json says of them.
    """

    def __init__(self, patterns: str, key: str, num_classes: int | None, cache: str = "", cache_gb: float = 100.0):
        self.key, self.num_classes = key, num_classes
        names, self.paths = expand(patterns, key)
        indices = {folder: read_index(folder) for folder in dict.fromkeys(path.parent for path in self.paths)}
        _refuse_gaps(indices, names, self.paths)
        self.warnings: list[str] = []
        """What is wrong with the shards, but does not keep their samples from being used."""
        self.entries = [indices[path.parent].get(path.name) for path in self.paths]
        self.offsets = [self._offsets(*one) for one in zip(self.paths, self.entries, strict=True)]
        self.counts = np.array([len(offsets) - 1 for offsets in self.offsets])
        self.samples = int(self.counts.sum())
        if not self.samples:
            raise InputError(f"key '{key}': {patterns!r} matches shards that hold no sample; make them anew")
        self._ends = np.cumsum(self.counts)
        self._files: OrderedDict[int, int] = OrderedDict()
        self.remote_bytes = sum(
            entry["bytes"] for path, entry in zip(self.paths, self.entries, strict=True) if isinstance(path, Url)
        )
        self.cache = Cache(Path(cache), int(cache_gb * 1e9)) if self.remote_bytes else None

    def ahead(self, first_uses: Callable[[int], Iterator[tuple[int, int]]], together: int | None, downloads: int) -> Ahead | None:
        """What fetches remote shards before they are needed; None if there are none.

        first_uses: from a batch on, (batch, shard) of the shards in the order of their first uses. together: how many shards are in
        use at a time. Raises InputError if these do not fit into the cache.
        """
        if self.cache is None:
            return None
        limit, together = self.cache.limit_bytes, min(together or len(self.paths), len(self.paths))
        if (wanted := self.remote_bytes * together // len(self.paths)) > limit:
            raise InputError(
                f"key 'data.cache_gb': {limit / 1e9:.3g} GB, but {together} shards of '{self.key}' are in use at a time, "
                f"{wanted / 1e9:.3g} GB; raise it, or lower key 'data.shuffle_shards'"
            )

        def plan(batch: int) -> Iterator[Need]:
            for position, shard in first_uses(batch):
                if isinstance(self.paths[shard], Url):
                    yield Need(position, *self._remote(shard))

        # Of a set that does not fit as a whole, what is coming must not drive out what is in use.
        return Ahead(self.cache, plan, limit if self.remote_bytes <= limit else max((limit - wanted) // 2, 1), downloads)

    def _remote(self, shard: int) -> tuple[str, int, str]:
        """URL, bytes and SHA-256."""
        return str(self.paths[shard]), self.entries[shard]["bytes"], self.entries[shard]["sha256"]

    def shard_of(self, indices: np.ndarray) -> np.ndarray:
        """The number of the shard that each of these samples is in."""
        return np.searchsorted(self._ends, indices, side="right")

    def __getitem__(self, index: int) -> Sample:
        """The sample with this number, 0 <= index < samples. Raises Fault if it cannot be used, OSError if its shard cannot."""
        shard, begin, end = self._place(index)
        try:
            chunk = os.pread(self._open(shard), end - begin, begin)
            if len(chunk) < end - begin:
                raise Fault("the shard is cut short before its end", first_key(chunk))
            return parse(chunk, self.num_classes)
        except Fault as fault:
            fault.shard, fault.offset = str(self.paths[shard]), begin
            raise

    def name(self, index: int, key: str | None = None) -> str:
        """SHARD/KEY of a sample. A key that is not known is read; of the sample only the first header, if that is enough."""
        shard, begin, end = self._place(index)
        if key is None:
            file = self._open(shard)
            key = first_key(os.pread(file, BLOCK, begin)) or first_key(os.pread(file, end - begin, begin))
        return f"{self.paths[shard].name}/{key}"

    def where(self, index: int) -> tuple[str, int]:
        """Path of the shard that a sample is in, and the byte at which it begins there."""
        shard, begin, _ = self._place(index)
        return str(self.paths[shard]), begin

    def origin(self, index: int, key: str, position: int) -> Origin:
        """Of the sample with this number and key, at `position` of an epoch's order."""
        return Origin(self.name(index, key), position, key, *self.where(index))

    def _place(self, index: int) -> tuple[int, int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[shard] - self.counts[shard])
        begin, end = self.offsets[shard][row : row + 2].tolist()
        return shard, begin, end

    def _open(self, shard: int) -> int:
        """A file descriptor of the shard; the OPEN_SHARDS used last stay open."""
        if shard not in self._files:
            if len(self._files) == OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            is_remote = isinstance(self.paths[shard], Url)
            self._files[shard] = self.cache.open(*self._remote(shard)) if is_remote else os.open(self.paths[shard], os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _offsets(self, path: Path | Url, entry: dict | None) -> np.ndarray:
        """Where each sample of a shard begins, and where the last one ends."""
        if isinstance(path, Url):
            if entry is None or entry["offsets"] is None or not entry["sha256"]:
                raise InputError(
                    f"{path.parent}/index.json: tells no offsets or digest of {path.name}, which a remote shard needs; "
                    f"make the index of a local copy with `python -m data_tools.index`, and put it beside the shards"
                )
            return np.array(entry["offsets"], dtype=np.int64)
        try:
            if not path.is_file():
                raise InputError(f"{path}: not a file; correct key '{self.key}'")
            with path.open("rb") as file:
                size = file.seek(0, io.SEEK_END)
                if entry is None or entry["offsets"] is None:
                    return self._scanned(path, file, entry)
        except OSError as error:
            raise InputError(f"{path}: shard cannot be read ({error.strerror}); check the file and key '{self.key}'") from None
        if size > entry["bytes"]:
            raise InputError(f"{path}: holds {size} bytes, index.json says {entry['bytes']}; make or copy the shard anew")
        offsets = np.array(entry["offsets"], dtype=np.int64)
        if size < entry["bytes"] and (lost := int((offsets[1:] > size).sum())):
            self.warnings.append(
                f"{path}: holds {size} bytes, index.json says {entry['bytes']}; its last {lost} samples are lost: copy it anew"
            )
        return offsets

    def _scanned(self, path: Path, file: BinaryIO, entry: dict | None) -> np.ndarray:
        offsets, faults = boundaries(file)
        if len(offsets) == 1 and faults:
            raise InputError(f"{path}: not a readable tar shard ({faults[0][1]}); make or copy it anew")
        if entry is not None and entry["samples"] not in (0, len(offsets) - 1):
            raise InputError(f"{path}: holds {len(offsets) - 1} samples, index.json says {entry['samples']}; make the index anew")
        for offset, reason in faults:
            self.warnings.append(f"{path}: at byte {offset}: {reason}; {len(offsets) - 1} samples were found: copy or make it anew")
        return np.array(offsets, dtype=np.int64)


def expand(patterns: str, key: str) -> tuple[list[str], list[Path | Url]]:
    """The paths and path patterns that `patterns` stands for once its braces are expanded, and the files they match.

    Raises InputError, naming the recipe's `key`, for a pattern that matches nothing or would run a program.
    """
    names, paths = [], []
    for pattern in _words(patterns, key):
        is_remote = remote.check(pattern, key)
        try:
            expanded = list(braceexpand(pattern))
        except UnbalancedBracesError as error:
            raise InputError(f"key '{key}': {pattern!r} is not a pattern ({error}); correct it") from None
        found = {one: _matches(one, is_remote, key) for one in expanded}
        # A shard that is named in full must be there; of a pattern with wildcards, one match is enough.
        missing = [one for one in expanded if not found[one] and not glob.has_magic(one)]
        if missing or not any(found.values()):
            raise InputError(
                f"key '{key}': no shard matches {missing[0] if missing else pattern!r}; make shards with "
                f"`python -m data_tools.make_shards` (for the demo: `python -m data_tools.make_shards digits data/digits`) "
                f"or correct the pattern (a path with blanks wants quotes of its own)"
            )
        names += expanded
        paths += [path for one in expanded for path in found[one]]
    if not paths:
        raise InputError(f"key '{key}': expected the path of shards, found {patterns!r}")
    return names, paths


def _matches(pattern: str, is_remote: bool, key: str) -> list[Path | Url]:
    """The files, sorted. A remote shard that is named in full is taken to be there: its index tells, or reading it."""
    if not is_remote:
        return [Path(path) for path in sorted(glob.glob(pattern))]
    if not glob.has_magic(pattern):
        return [Url(pattern)]
    folder = Url(pattern).parent
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


def _refuse_gaps(indices: dict[Path | Url, dict[str, dict]], names: list[str], paths: list[Path | Url]) -> None:
    """Raise InputError if an index tells of a shard that `names` asks for and that is not there."""
    there = set(paths)
    for folder, index in indices.items():
        if isinstance(folder, Url):
            continue
        for path in (folder / file for file in index):
            if path not in there and any(fnmatch(str(path), str(Path(name))) for name in names):
                raise InputError(f"{path}: no such shard, but index.json tells of it; copy it here or make the index anew")


def read_index(folder: Path | Url) -> dict[str, dict]:
    """What folder/index.json says of each shard, by its name; {} if there is none. Raises InputError if it is damaged."""
    is_remote = isinstance(folder, Url)
    where = f"{folder}/index.json"
    try:
        content = json.loads(_remote_index(where) if is_remote else Path(where).read_text())
        return {entry["file"]: _entry(entry) for entry in content["shards"]}
    except FileNotFoundError:
        return {}
    except remote.RemoteError as error:
        raise InputError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(f"{where}: not an index of shards ({error!r}); remove it or make it anew") from None


@functools.lru_cache(8)
def _remote_index(url: str) -> bytes:
    """It is asked for by each pattern and each split; of a running process it does not change."""
    return remote.read(url)


def _entry(entry: dict) -> dict:
    """One checked entry of an index. Raises ValueError or TypeError."""
    samples, size, offsets = int(entry["samples"]), int(entry["bytes"]), entry.get("offsets")
    if samples < 0:
        raise ValueError("a negative number of samples")
    if offsets is not None:
        ends = np.array(offsets)
        rising = ends.dtype == np.int64 and ends.ndim == 1 and (ends[1:] > ends[:-1]).all()
        if not rising or len(ends) != samples + 1 or ends[0] < 0 or ends[-1] > size:
            raise ValueError(f"offsets of {entry['file']} that are not those of {samples} samples in {size} bytes")
    return {"samples": samples, "bytes": size, "offsets": offsets, "sha256": entry.get("sha256")}
