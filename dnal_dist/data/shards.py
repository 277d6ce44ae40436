"""Shards: which samples there are, where each of them lies, and any one of them.

index.json beside the shards holds where each sample begins, so a sample is read with one request and nothing is read before it.
"""

import functools
import io
import math
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dnal_dist.common.errors import InputError
from dnal_dist.data.cache import Cache
from dnal_dist.data.prefetch import Need, Prefetcher
from dnal_dist.data.shardlist import Url, expand, read_index, refuse_gaps
from dnal_dist.data.tar import BLOCK, Fault, Sample, boundaries, first_key, parse

OPEN_SHARDS = 64


class Origin(NamedTuple):
    """Where a sample of a batch is from: its name and position for the receipt; key, shard, byte and number for messages."""

    name: str
    position: int
    key: str
    shard: str
    offset: int
    index: int

    def fault(self, reason: str) -> Fault:
        return Fault(reason, self.key, self.shard, self.offset, self.index)


class Shards:
    """The shards of one split, in the order of `patterns`; the samples of all of them are numbered through. Remote ones are read
    from copies in the folder `cache`, which holds at most `cache_gb` GB.

    Raises InputError if there are none, or if they are not what index.json says of them.
    """

    def __init__(self, patterns: str, key: str, num_classes: int | None, cache: str = "", cache_gb: float = 100.0):
        self.key, self.num_classes = key, num_classes
        names, self.paths = expand(patterns, key)
        indices = {folder: read_index(folder) for folder in dict.fromkeys(path.parent for path in self.paths)}
        refuse_gaps(indices, names, self.paths)
        self.warnings: list[str] = []
        """What is wrong with the shards, but does not keep their samples from being used."""
        self.entries = [indices[path.parent].get(path.name) for path in self.paths]
        self.offsets = [self._offsets(*one) for one in zip(self.paths, self.entries, strict=True)]
        for entry in filter(None, self.entries):
            # As arrays they take a fifth of the memory.
            entry["offsets"] = None
        self.counts = np.array([len(offsets) - 1 for offsets in self.offsets])
        self.samples = int(self.counts.sum())
        if not self.samples:
            raise InputError(f"key '{key}': {patterns!r} matches shards that hold no sample; make them anew")
        self._starts = [0, *np.cumsum(self.counts).tolist()]
        self._files: OrderedDict[int, int] = OrderedDict()
        self.open_shards = OPEN_SHARDS
        self.remote_bytes = sum(
            entry["bytes"] for path, entry in zip(self.paths, self.entries, strict=True) if isinstance(path, Url)
        )
        self.cache = Cache(Path(cache), int(cache_gb * 1e9)) if self.remote_bytes else None

    def ahead(
        self, first_uses: Callable[[int], Iterator[tuple[int, int]]], together: int | None, downloads: int
    ) -> Prefetcher | None:
        """What fetches remote shards before they are needed; None if there are none.

        first_uses: from a batch on, (batch, shard) of the shards in the order of their first uses. together: how many shards are in
        use at a time. Raises InputError if these do not fit into the cache.
        """
        if self.cache is None:
            return None
        limit, sizes = self.cache.limit_bytes, sorted((self._remote(shard)[1] for shard in self._remote_shards()), reverse=True)
        # Shards come and go at chance, so that there are now more of them and now fewer.
        in_use = min(len(sizes), math.ceil(1.3 * together) + 2) if together else len(sizes)
        if (wanted := sum(sizes[:in_use])) > limit:
            raise InputError(
                f"key 'data.cache_gb': {limit / 1e9:.3g} GB, but {in_use} shards of '{self.key}' may be in use at a time, "
                f"{wanted / 1e9:.3g} GB; raise it, or lower key 'data.shuffle_shards'"
            )
        fits = self.remote_bytes <= limit
        if not fits:
            # The space of a copy that made room for others comes free when it is closed.
            self.open_shards = min(OPEN_SHARDS, in_use)
        # Of a set that does not fit as a whole, what is coming must not drive out what is in use.
        plan = functools.partial(self._needs, first_uses, fits)
        return Prefetcher(self.cache, plan, limit if fits else max((limit - wanted) // 2, 1), downloads)

    def _needs(self, first_uses: Callable[[int], Iterator[tuple[int, int]]], once: bool, batch: int) -> Iterator[Need]:
        """Remote shards in the order in which they are needed from `batch` on; `once`: none of them again."""
        left = set(self._remote_shards())
        for position, shard in first_uses(batch):
            if shard in left:
                yield Need(position, *self._remote(shard))
                if once:
                    left.discard(shard)
            if not left:
                return

    def _remote_shards(self) -> list[int]:
        return [shard for shard, path in enumerate(self.paths) if isinstance(path, Url)]

    def _remote(self, shard: int) -> tuple[str, int, str]:
        """URL, bytes and SHA-256."""
        return str(self.paths[shard]), self.entries[shard]["bytes"], self.entries[shard]["sha256"]

    def shard_of(self, indices: np.ndarray) -> np.ndarray:
        """The number of the shard that each of these samples is in."""
        return np.searchsorted(self._starts, indices, side="right") - 1

    def __getitem__(self, index: int) -> Sample:
        """The sample with this number, 0 <= index < samples. Raises Fault if it cannot be used, OSError if its shard cannot."""
        return self.take(index, 0)[0]

    def take(self, index: int, position: int) -> tuple[Sample, Origin]:
        """The sample with this number, and where it is from, at `position` of an epoch's order. Raises as `[index]` does."""
        shard, begin, end = self._place(index)
        try:
            chunk = os.pread(self._open(shard), end - begin, begin)
            if len(chunk) < end - begin:
                raise Fault("the shard is cut short before its end", first_key(chunk))
            sample = parse(chunk, self.num_classes)
        except Fault as fault:
            fault.shard, fault.offset, fault.index = str(self.paths[shard]), begin, index
            raise
        return sample, Origin(self._name(shard, begin, sample.key), position, sample.key, str(self.paths[shard]), begin, index)

    def name(self, index: int) -> str:
        """What a receipt knows a sample by; only its first header is read, if that is enough to tell its key."""
        shard, begin, end = self._place(index)
        file = self._open(shard)
        return self._name(shard, begin, first_key(os.pread(file, BLOCK, begin)) or first_key(os.pread(file, end - begin, begin)))

    def _name(self, shard: int, begin: int, key: str | None) -> str:
        # Two folders may have shards of one name, and two samples one key.
        return f"{shard}/{self.paths[shard].name}/{begin}/{key}"

    def where(self, index: int) -> tuple[str, int]:
        """Path of the shard that a sample is in, and the byte at which it begins there."""
        shard, begin, _ = self._place(index)
        return str(self.paths[shard]), begin

    def _place(self, index: int) -> tuple[int, int, int]:
        shard = bisect_right(self._starts, index) - 1
        row, offsets = index - self._starts[shard], self.offsets[shard]
        return shard, int(offsets[row]), int(offsets[row + 1])

    def fingerprints(self) -> list[str]:
        """One line for each shard, of what all processes of a run must find alike; of a local one with its first and last key."""
        lines = []
        for path, offsets, entry, (first, end) in zip(self.paths, self.offsets, self.entries, pairwise(self._starts), strict=True):
            places = blake2b(offsets.tobytes(), digest_size=8).hexdigest()
            keys = [] if isinstance(path, Url) or first == end else [self.name(first), self.name(end - 1)]
            digest = (entry["sha256"] if entry else None) or "no digest"
            lines.append(f"{path.name}, {end - first} samples at {places}, {digest} {' '.join(keys)}".strip())
        return lines

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self):
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict:
        # The numbers of this process's open files mean others, or nothing, in another process.
        return self.__dict__ | {"_files": OrderedDict()}

    def _open(self, shard: int) -> int:
        """A file descriptor of the shard; the `open_shards` used last stay open."""
        if shard not in self._files:
            while len(self._files) >= self.open_shards:
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
