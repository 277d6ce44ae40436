"""Samples by their number, over all shards of a split.

index.json beside the shards holds where each sample begins, so a sample is read with one request and nothing is read before it.
"""

import functools
import os
from bisect import bisect_right
from collections import Counter
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dnal_dist.common.errors import InputError
from dnal_dist.data import remote
from dnal_dist.data.cache import Cache
from dnal_dist.data.classes import class_names, class_numbers
from dnal_dist.data.files import OPEN_SHARDS, ShardFiles
from dnal_dist.data.offsets import sample_offsets
from dnal_dist.data.samples import HEAD, MOST_BYTES, Fault, Sample, SampleFormat, oversized, parse
from dnal_dist.data.shardlist import Url, expand, read_index, refuse_gaps
from dnal_dist.data.tar import BLOCK, first_key
from dnal_dist.recipe import Data

# Samples of local shards that are read at the start, for the kinds of their members.
SURVEYED = 16


class Origin(NamedTuple):
    """Where a sample of a batch is from: name and position for the receipt; key, shard, byte and number for messages."""

    name: str
    position: int
    key: str
    shard: str
    offset: int
    index: int

    def fault(self, reason: str) -> Fault:
        return Fault(reason, self.key, self.shard, self.offset, self.index)


class RemoteShard(NamedTuple):
    url: str
    size: int
    sha256: str


class Shards:
    """The shards of one split, in the order of `patterns`; the samples of all of them are numbered through. data: how a recipe has
    them read (members, cache); `patterns` is from there too, and `key` its key.

    Raises InputError if there are none, if they are not what index.json says of them, or if the recipe must name their members.
    """

    def __init__(self, patterns: str, key: str, num_classes: int | None = None, data: Data | None = None):
        self.key, self.num_classes = key, num_classes
        data = data or Data(train=patterns, val=patterns, image_size=1, global_batch=1)
        names, self.paths = expand(patterns, key)
        indices = {folder: read_index(folder) for folder in dict.fromkeys(path.parent for path in self.paths)}
        refuse_gaps(indices, names, self.paths)
        classes = {folder: class_names(folder) for folder in indices}
        self.classes = {f"{folder}/index.json": found for folder, found in classes.items() if found}
        """Names of the classes, by the index that has them."""
        named = (data.label_key, data.image, data.label)
        self.formats = {folder: SampleFormat(num_classes, class_numbers(found), *named) for folder, found in classes.items()}
        self.entries = [indices[path.parent].get(path.name) for path in self.paths]
        self.offsets, found = zip(*(sample_offsets(*one, key) for one in zip(self.paths, self.entries, strict=True)), strict=True)
        self.warnings: list[str] = [warning for warnings in found for warning in warnings]
        """What is wrong with the shards, but does not keep their samples from being used."""
        self.labels: np.ndarray | None = None
        """Of all samples as the indices have them, once `by_class` was asked for; -1 for a sample without one."""
        for entry in filter(None, self.entries):
            # As arrays they take a fifth of the memory.
            entry["offsets"] = None
        self.counts = np.array([len(offsets) - 1 for offsets in self.offsets])
        self.samples = int(self.counts.sum())
        if not self.samples:
            raise InputError(f"key '{key}': {patterns!r} matches shards that hold no sample; make them again")
        self._starts = [0, *np.cumsum(self.counts).tolist()]
        self.remote = {
            shard: RemoteShard(str(path), self.entries[shard]["bytes"], self.entries[shard]["sha256"])
            for shard, path in enumerate(self.paths)
            if isinstance(path, Url)
        }
        """Remote shards, by their number."""
        self.remote_bytes = sum(shard.size for shard in self.remote.values())
        self.cache = Cache(Path(data.cache), int(data.cache_gb * 1e9)) if self.remote else None
        self.files = ShardFiles(functools.partial(_opened, self.paths, self.remote, self.cache), OPEN_SHARDS)
        redirected = [f"{url}: {to}" for url, to in remote.redirects.items() if Url(url).parent in indices]
        self.notes = [*self._surveyed(), *redirected, *([self.cache.note] if self.cache and self.cache.note else [])]
        """What is right but worth knowing, one line each."""

    @property
    def bytes(self) -> int:
        """Bytes that the samples take in the shards."""
        return sum(int(offsets[-1] - offsets[0]) for offsets in self.offsets if len(offsets))

    def shard_of(self, indices: np.ndarray) -> np.ndarray:
        """The number of the shard that each of these samples is in."""
        return np.searchsorted(self._starts, indices, side="right") - 1

    def __getitem__(self, index: int) -> Sample:
        """The sample with this number, 0 <= index < samples. Raises Fault if it cannot be used, OSError if its shard cannot."""
        return self.take(index, 0)[0]

    def take(self, index: int, position: int) -> tuple[Sample, Origin]:
        """The sample with this number and its origin, at `position` of an epoch's order. Raises as `[index]` does."""
        shard, begin, end = self.locate(index)
        path = self.paths[shard]
        try:
            if end - begin > MOST_BYTES:
                raise oversized(self.files.read(shard, begin, HEAD), end - begin, self.formats[path.parent])
            chunk = self.files.read(shard, begin, end - begin)
            if len(chunk) < end - begin:
                raise Fault("the shard is cut short before its end", first_key(chunk))
            sample = parse(chunk, self.formats[path.parent])
            if self.labels is not None and sample.label != self.labels[index]:
                raise Fault(f"its label is {sample.label}, in index.json {self.labels[index]}; make the index again", sample.key)
        except Fault as fault:
            fault.shard, fault.offset, fault.index = str(path), begin, index
            raise
        return sample, self.origin(index, position, sample.key)

    def origin(self, index: int, position: int, key: str) -> Origin:
        """Of the sample with this number and key, at `position` of an epoch's order."""
        shard, begin, _ = self.locate(index)
        return Origin(self._name(shard, begin, key), position, key, str(self.paths[shard]), begin, index)

    def name(self, index: int) -> str:
        """A sample's name in receipts; only its first header is read, if that is enough for its key."""
        shard, begin, end = self.locate(index)
        key = first_key(self.files.read(shard, begin, BLOCK)) or first_key(self.files.read(shard, begin, end - begin))
        return self._name(shard, begin, key)

    def _name(self, shard: int, begin: int, key: str | None) -> str:
        # Two folders may have shards of one name, and two samples one key.
        return f"{shard}/{self.paths[shard].name}/{begin}/{key}"

    def where(self, index: int) -> tuple[str, int]:
        """Path of the shard that a sample is in, and the byte at which it begins there."""
        shard, begin, _ = self.locate(index)
        return str(self.paths[shard]), begin

    def locate(self, index: int) -> tuple[int, int, int]:
        """Number of the shard that a sample is in, and the bytes at which the sample begins and ends there."""
        shard = bisect_right(self._starts, index) - 1
        row, offsets = index - self._starts[shard], self.offsets[shard]
        return shard, int(offsets[row]), int(offsets[row + 1])

    def by_class(self, sampling: str | list[float]) -> tuple[np.ndarray, np.ndarray]:
        """The labels of all samples, and the share of each class in an epoch by the recipe's data.sampling. Raises InputError."""
        for path, entry in zip(self.paths, self.entries, strict=True):
            if entry is None or entry["labels"] is None:
                raise InputError(
                    f"key 'data.sampling': needs the labels of all samples, but {path.parent}/index.json has none of {path.name}; "
                    f"`python -m data_tools.index {path.parent}` adds them"
                )
        self.labels = np.concatenate([entry["labels"] for entry in self.entries])
        counts = np.bincount(self.labels[self.labels >= 0], minlength=0 if sampling == "balanced" else len(sampling))
        shares = np.ones(len(counts)) if sampling == "balanced" else np.array(sampling)
        if len(shares) < len(counts):
            found = f"{len(shares)} shares for {len(counts)} classes"
            raise InputError(f"key 'data.sampling': {found} of '{self.key}'; give one for each")
        if not (total := (shares * (counts > 0)).sum()):
            raise InputError(f"key 'data.sampling': '{self.key}' has no labelled image of a class whose share is above 0")
        if missing := np.flatnonzero((counts == 0) & (shares > 0)).tolist():
            self.notes.append(f"key 'data.sampling': '{self.key}' has no image of {len(missing)} classes ({missing[0]}, ...)")
        if unusable := int((self.labels < 0).sum()):
            self.notes.append(f"key 'data.sampling': {unusable} samples of '{self.key}' without a good label are not drawn")
        return self.labels, shares * (counts > 0) / total

    def class_names(self) -> int:
        """Classes that the indices of the shards name, the most of any; 0 if none names any."""
        return max(map(len, self.classes.values()), default=0)

    def _surveyed(self) -> list[str]:
        """A line about members of kinds that have no reader, in a few samples of local shards, if any have. Raises InputError if
        most of these samples have several images or labels: then it is the recipe that is wrong, not a sample."""
        chosen = np.unique(np.linspace(0, self.samples - 1, min(SURVEYED, self.samples)).round().astype(int)).tolist()
        chosen = [index for index in chosen if self.locate(index)[0] not in self.remote]
        kinds: Counter[str] = Counter()
        ambiguous = []
        for index in chosen:
            try:
                kinds.update(set(self[index].unread))
            except Fault as fault:
                kinds.update(fault.unread)
                ambiguous += [fault] * fault.ambiguous
            except OSError:
                continue
        if 2 * len(ambiguous) > len(chosen):
            raise InputError(f"{ambiguous[0]} (so in {len(ambiguous)} of {len(chosen)} samples read of '{self.key}')")
        if not kinds:
            return []
        found = ", ".join(f".{kind} in {count}" for kind, count in sorted(kinds.items()))
        return [f"key '{self.key}': members without a reader are left alone: {found} of {len(chosen)} samples read"]

    def fingerprints(self) -> list[str]:
        """One line for each shard, of what all processes of a run must find alike; of a local one with its first and last key."""
        lines = []
        for path, offsets, entry, (first, end) in zip(self.paths, self.offsets, self.entries, pairwise(self._starts), strict=True):
            places = blake2b(offsets.tobytes(), digest_size=8).hexdigest()
            keys = [] if isinstance(path, Url) or first == end else [self.name(first), self.name(end - 1)]
            digest = (entry["sha256"] if entry else None) or "no digest"
            drawn = [] if self.labels is None else [blake2b(self.labels[first:end].tobytes(), digest_size=8).hexdigest()]
            lines.append(f"{path.name}, {end - first} samples at {places}, {digest} {' '.join([*keys, *drawn])}".strip())
        return lines

    def close(self) -> None:
        self.files.close()


def _opened(paths: list[Path | Url], remote: dict[int, RemoteShard], cache: Cache | None, shard: int) -> int:
    return cache.open(*remote[shard]) if shard in remote else os.open(paths[shard], os.O_RDONLY)
