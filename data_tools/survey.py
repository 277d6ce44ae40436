"""Reads whole shards, as training would: what samples there are, and what is wrong with them."""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_tools.images import decoding_fault
from data_tools.workers import Tick
from dnal_dist.data import remote
from dnal_dist.data.shardlist import Url
from dnal_dist.data.tar import Fault, boundaries, parse

# More than any image takes: such a sample is a shard whose headers are damaged, or means harm.
MOST_BYTES = 1 << 28
MOST_CLASSES = 1 << 20
PIECE = 1 << 22


@contextlib.contextmanager
def opened(path: Path | Url) -> Iterator[BinaryIO]:
    """A shard to read; a remote one is in memory as a whole, since its headers lie all over it. Raises OSError."""
    if isinstance(path, Url):
        yield io.BytesIO(remote.read(str(path)))
        return
    with path.open("rb") as file:
        yield file


def chunk(path: Path | Url, begin: int, end: int) -> bytes:
    """Some bytes of a shard. Raises OSError."""
    if isinstance(path, Url):
        return remote.read(str(path), begin, end)
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


class Good(NamedTuple):
    """A sample that parses."""

    key: str
    label: int
    digest: bytes
    """Of its image."""
    row: int
    """Its number in the shard."""


class Survey(NamedTuple):
    path: Path | Url
    entry: dict
    """What the index should say of the shard."""
    damage: list[tuple[int, str]]
    """(byte, reason) of what is wrong between samples."""
    faults: list[tuple[str, str]]
    """(key or place, reason) of samples that training would skip."""
    good: list[Good]
    sizes: list[tuple[int, int]]
    """Width and height of what was decoded."""


class Surveyor(NamedTuple):
    """Surveys shards, in a worker. decode: every image is decoded too."""

    decode: bool = False

    def __call__(self, path: Path | Url, tick: Tick) -> Survey:
        """Raises OSError if the shard cannot be read."""
        with opened(path) as file:
            offsets, damage = boundaries(file)
            if damage and _begins_as_gzip(file):
                damage = [(0, "it is compressed; gunzip it")]
            size, digest = file.seek(0, io.SEEK_END), hashlib.sha256()
            file.seek(0)
            _pass(file, offsets[0], digest)
            faults, good, sizes = [], [], []
            for row, (begin, end) in enumerate(pairwise(offsets)):
                self._sample(file, row, begin, end, digest, (faults, good, sizes))
                tick(end - begin)
            _pass(file, size - offsets[-1], digest)
        entry = {
            "file": path.name,
            "samples": len(offsets) - 1,
            "bytes": size,
            "sha256": digest.hexdigest(),
            # A shard that was cut short: what is left of its last member may end anywhere.
            "offsets": [min(offset, size) for offset in offsets],
        }
        return Survey(path, entry, damage, faults, good, sizes)

    def _sample(self, file: BinaryIO, row: int, begin: int, end: int, digest, found: tuple[list, list, list]) -> None:
        faults, good, sizes = found
        if end - begin > MOST_BYTES:
            faults.append((f"at byte {begin}", f"it takes {end - begin} bytes, more than any image"))
            return _pass(file, end - begin, digest)
        content = file.read(end - begin)
        digest.update(content)
        try:
            sample = parse(content)
        except Fault as fault:
            return faults.append((fault.key or f"at byte {begin}", fault.reason))
        if sample.label >= MOST_CLASSES:
            return faults.append((sample.key, f"label {sample.label} is larger than any network's"))
        good.append(Good(sample.key, sample.label, hashlib.blake2b(sample.image, digest_size=16).digest(), row))
        if self.decode:
            reason, size = decoding_fault(sample.image) if sample.image else ("it is empty", None)
            if reason:
                faults.append((sample.key, reason))
            elif size:
                sizes.append(size)


def _begins_as_gzip(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(2) == b"\x1f\x8b"


def _pass(file: BinaryIO, count: int, digest) -> None:
    """Read `count` bytes for the digest alone."""
    while count > 0 and (piece := file.read(min(count, PIECE))):
        digest.update(piece)
        count -= len(piece)
