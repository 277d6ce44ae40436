"""Shards: which samples there are, where each of them lies, and the bytes of any one.

A shard is an ordinary webdataset tar: neighbouring members with one key, the path up to the first dot of its last component, are a
sample. A picture (png, jpg, jpeg) and a class number (cls) are read of it. index.json beside the shards holds where each sample
begins, so a sample is read with one request and nothing is read before it. Nothing that a shard holds is ever executed, unpickled,
or written to disk under a name that it chose.
"""

import functools
import glob
import io
import json
import os
import shlex
import tarfile
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

PICTURES = ("png", "jpg", "jpeg")
# Members that readers of webdataset shards are known to run programs from. A sample that has one is not used.
REFUSED = ("pyd", "pickle", "pkl", "pt", "pth", "dill")
BLOCK = tarfile.BLOCKSIZE
OPEN_SHARDS = 64


class Fault(Exception):
    """A sample that cannot be used, and why."""

    def __init__(self, reason: str, key: str | None = None, shard: str = "", offset: int = 0):
        super().__init__(reason)
        self.reason, self.key, self.shard, self.offset = reason, key, shard, offset

    def __reduce__(self):
        return type(self), (self.reason, self.key, self.shard, self.offset)

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key or '?'} at byte {self.offset}: {self.reason}"


class Url(str):
    """Where a remote shard or its folder is, with what of Path's is used here."""

    @property
    def name(self) -> str:
        return self.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        return Url(self.rpartition("/")[0])


class Sample(NamedTuple):
    key: str
    picture: bytes
    extension: str
    label: int


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
                raise Fault("the shard is cut short before its end", _key_of(chunk))
            return parse(chunk, self.num_classes)
        except Fault as fault:
            fault.shard, fault.offset = str(self.paths[shard]), begin
            raise

    def name(self, index: int, key: str | None = None) -> str:
        """SHARD/KEY of a sample. A key that is not known is read; of the sample only the first header, if that is enough."""
        shard, begin, end = self._place(index)
        if key is None:
            file = self._open(shard)
            key = _key_of(os.pread(file, BLOCK, begin)) or _key_of(os.pread(file, end - begin, begin))
        return f"{self.paths[shard].name}/{key}"

    def where(self, index: int) -> tuple[str, int]:
        """Path of the shard that a sample is in, and the byte at which it begins there."""
        shard, begin, _ = self._place(index)
        return str(self.paths[shard]), begin

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
    if index := read_index(folder):
        return [Url(f"{folder}/{file}") for file in sorted(index) if fnmatch(f"{folder}/{file}", pattern)]
    try:
        return [Url(url) for url in remote.glob(pattern)]
    except (OSError, ValueError) as error:
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


def boundaries(file: BinaryIO) -> tuple[list[int], list[tuple[int, str]]]:
    """Where each sample of the tar `file` begins and, as the last number, where the last one ends; and what is wrong, as (byte,
    reason). Only headers are read. Behind damage the next whole header is looked for; a damaged stretch counts as a sample."""
    offsets, faults, last, end = [], [], None, 0
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        # ignore_zeros: damage, and the blocks of zeros at the end, are stepped over block by block.
        tar = tarfile.TarFile(fileobj=file, ignore_zeros=True)
        for member in tar:
            if member.size < 0 or member.offset < end:
                raise tarfile.TarError("a member of impossible size")
            damaged = member.offset > end and not _is_zeros(file, end, member.offset)
            key = key_of(member.name)
            if damaged:
                faults.append((end, "damaged"))
                if key != last:
                    offsets.append(end)
            if key is not None and key != last:
                offsets.append(member.offset)
                last = key
            # Not from its size: that of a sparse member is what it would unpack to.
            end = tar.offset
    except Exception as error:  # of many kinds, where a header means harm
        faults.append((end, " ".join(str(error).split()) or type(error).__name__))
    if not faults and not _is_zeros(file, end, end + BLOCK):
        faults.append((min(end, size), "cut short or damaged behind its last whole member"))
    return [*offsets, min(end, size)], faults


def _is_zeros(file: BinaryIO, begin: int, end: int) -> bool:
    file.seek(begin)
    while begin < end:
        block = file.read(min(end - begin, 1 << 20))
        if not block or block.count(0) != len(block):
            return False
        begin += len(block)
    return True


def key_of(name: str) -> str | None:
    """The key of a tar's member: its path up to the first dot of the last component; None if it is of no sample."""
    folder, slash, last = name.rpartition("/")
    stem, dot, _ = last.partition(".")
    if not stem or not dot or (not slash and name.startswith("__") and name.endswith("__")):
        return None
    return folder + slash + stem


def parse(chunk: bytes, num_classes: int | None = None) -> Sample:
    """The sample that `chunk`, its members in tar format, holds. Raises Fault for anything else than one picture and one class
    number in [0, num_classes), and for members that mean harm."""
    pictures, labels, key = [], [], None
    try:
        for name, kind, begin, size in _members(chunk):
            if kind == tarfile.DIRTYPE or (this := key_of(name)) is None:
                continue
            key = this if key is None else key
            extension = name.rpartition("/")[2].partition(".")[2].lower()
            if kind not in tarfile.REGULAR_TYPES or kind == tarfile.GNUTYPE_SPARSE:
                raise Fault("it has a link or another special file, which is refused")
            if name.startswith("/") or ".." in name.split("/"):
                raise Fault("its name leads out of the shard, which is refused")
            if extension.rpartition(".")[2] in REFUSED:
                raise Fault(f"it has a .{extension}, which is refused: reading it could run any program")
            if begin + size > len(chunk):
                raise Fault("it is cut short")
            if extension in PICTURES:
                pictures.append((extension, begin, size))
            elif extension == "cls":
                labels.append(chunk[begin : begin + min(size, 20)])
        if len(pictures) != 1 or len(labels) != 1:
            raise Fault(
                f"expected one picture ({', '.join(PICTURES)}) and one class (cls), found {len(pictures)} and {len(labels)}"
            )
        text = labels[0].strip()
        if not text.isdigit() or (num_classes is not None and int(text) >= num_classes):
            bound = f" from 0 to {num_classes - 1} (model.num_classes is {num_classes})" if num_classes else ""
            raise Fault(f"label {text.decode('latin-1')!a} is out of range, expected a whole number{bound}")
    except Fault as fault:
        fault.key = shown(key)
        raise
    extension, begin, size = pictures[0]
    return Sample(shown(key), chunk[begin : begin + size], extension, int(text))


def shown(key: str | None) -> str | None:
    """A key as it can be shown: it may hold what moves a terminal's cursor, or bytes that are no text."""
    return key if key is None or key.isprintable() else ascii(key)[1:-1]


def _key_of(chunk: bytes) -> str | None:
    try:
        return shown(next((key for member in _members(chunk) if (key := key_of(member[0])) is not None), None))
    except Fault:
        return None


def _members(chunk: bytes) -> Iterator[tuple[str, bytes, int, int]]:
    """Name, type, first byte and size of each member. Raises Fault where a header is damaged."""
    at = 0
    while at < len(chunk):
        header = chunk[at : at + BLOCK]
        member = _plain(header)
        if member is None:
            if header.count(0) == len(header):
                return
            yield from _by_tarfile(chunk, at)
            return
        name, kind, size = member
        at += BLOCK
        yield name, kind, at, size
        at += -(-size // BLOCK) * BLOCK


def _plain(header: bytes) -> tuple[str, bytes, int] | None:
    """Name, type and size of a plain ustar header, which nearly all are; None for anything else. An eighth of tarfile's time."""
    if len(header) != BLOCK or header[345] or header[156:157] not in (b"0", b"\0", b"5") or header[257:262] != b"ustar":
        return None
    try:
        wanted, size = int(header[148:156].rstrip(b" \0"), 8), int(header[124:136].rstrip(b" \0"), 8)
    except ValueError:
        return None
    if sum(header) - sum(header[148:156]) + 256 != wanted or size < 0:
        return None
    return header[:100].rstrip(b"\0").decode("utf-8", "surrogateescape"), header[156:157], size


def _by_tarfile(chunk: bytes, at: int) -> Iterator[tuple[str, bytes, int, int]]:
    end = at
    try:
        tar = tarfile.TarFile(fileobj=io.BytesIO(chunk[at:]))
        for member in tar:
            if member.size < 0:
                raise tarfile.TarError("a member of negative size")
            yield member.name, member.type, at + member.offset_data, member.size
            end = at + tar.offset
    except Exception as error:  # of many kinds, where a header means harm
        raise Fault(f"its tar header is damaged ({' '.join(str(error).split())})") from None
    if end < len(chunk) and chunk[end : end + BLOCK].count(0) != len(chunk[end : end + BLOCK]):
        # tarfile takes a damaged header for the end of the archive.
        raise Fault("its tar header is damaged")
