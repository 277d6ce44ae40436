"""Whole shards read as training reads them: their samples, and what is wrong with them."""

import contextlib
import errno
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_tools.images import MAX_PIXELS
from data_tools.workers import Tick
from dnal_dist.data import remote
from dnal_dist.data.decoding import Header, refusal
from dnal_dist.data.samples import HEAD, MOST_BYTES, Fault, SampleFormat, oversized, parse
from dnal_dist.data.shardlist import MOST_CLASSES, Url
from dnal_dist.data.tar import boundaries, compressed

PIECE = 1 << 22
# Bytes of a remote shard.
MOST_REMOTE = 4 << 30


@contextlib.contextmanager
def opened(path: Path | Url) -> Iterator[BinaryIO]:
    """A shard to read; a remote one is held in memory, since its headers lie all over it. Raises OSError."""
    if isinstance(path, Url):
        yield io.BytesIO(remote.read(str(path), most=MOST_REMOTE))
        return
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no regular file; leave it out, or put the shard itself there", str(path))
    with path.open("rb") as file:
        yield file


class Good(NamedTuple):
    """A sample that training can use."""

    key: str
    label: int
    digest: bytes
    """Of its image."""
    row: int
    """Its number in the shard."""


class Survey(NamedTuple):
    path: Path | Url
    form: SampleFormat
    entry: dict
    """The shard's entry for the index."""
    damage: list[tuple[int, str]]
    """(byte, reason) of damage between samples."""
    faults: list[tuple[str, str]]
    """(key or byte, reason) of samples that training would skip."""
    good: list[Good]
    headers: list[Header]
    """Of decoded images."""
    unread: Counter[str]
    """Samples with a member that has no reader, by its extension."""

    def image(self, good: Good) -> bytes:
        """The encoded image of a sample, read again. Raises OSError or Fault."""
        begin, end = self.entry["offsets"][good.row : good.row + 2]
        if isinstance(self.path, Url):
            return parse(remote.read(str(self.path), begin, end), self.form).image
        with self.path.open("rb") as file:
            file.seek(begin)
            return parse(file.read(end - begin), self.form).image


class Surveyor(NamedTuple):
    """Surveys shards, in a worker process. forms: by folder; decode: every image is decoded too."""

    forms: Mapping[Path | Url, SampleFormat]
    decode: bool = False

    def __call__(self, path: Path | Url, tick: Tick) -> Survey:
        """Raises OSError if the shard cannot be read."""
        found = Survey(path, self.forms[path.parent], {}, [], [], [], [], Counter())
        with opened(path) as file:
            offsets, damage = boundaries(file)
            if damage and (remedy := compressed(file)):
                damage = [(0, remedy)]
            size, digest = file.seek(0, io.SEEK_END), hashlib.sha256()
            file.seek(0)
            _skip(file, offsets[0], digest)
            for row, (begin, end) in enumerate(pairwise(offsets)):
                self._sample(file, row, begin, end, digest, found)
                tick(end - begin)
            _skip(file, size - offsets[-1], digest)
        found.damage.extend(damage)
        found.entry.update(file=path.name, samples=len(offsets) - 1, bytes=size, sha256=digest.hexdigest())
        # In a shard that was cut short the last member would end behind the file.
        found.entry["offsets"] = [min(offset, size) for offset in offsets]
        labels = {good.row: good.label for good in found.good}
        found.entry["labels"] = [labels.get(row, -1) for row in range(len(offsets) - 1)]
        return found

    def _sample(self, file: BinaryIO, row: int, begin: int, end: int, digest, found: Survey) -> None:
        if end - begin > MOST_BYTES:
            head = file.read(HEAD)
            digest.update(head)
            fault = oversized(head, end - begin, found.form)
            found.faults.append((fault.key or f"at byte {begin}", fault.reason))
            return _skip(file, end - begin - len(head), digest)
        content = file.read(end - begin)
        digest.update(content)
        try:
            sample = parse(content, found.form)
        except Fault as fault:
            found.unread.update(fault.unread)
            return found.faults.append((fault.key or f"at byte {begin}", fault.reason))
        found.unread.update(set(sample.unread))
        if sample.label >= MOST_CLASSES:
            return found.faults.append((sample.key, f"label {sample.label} is larger than any network's"))
        found.good.append(Good(sample.key, sample.label, hashlib.blake2b(sample.image, digest_size=16).digest(), row))
        if self.decode:
            reason, header = refusal(sample.image, MAX_PIXELS)
            if reason:
                found.faults.append((sample.key, reason))
            else:
                found.headers.append(header)


def unread_line(surveys: list[Survey]) -> str:
    """One line about all members without a reader, by kind and number of samples; "" if there are none."""
    kinds = sum((one.unread for one in surveys), Counter())
    listed = ", ".join(f".{kind} ({number:,})" for kind, number in sorted(kinds.items()))
    return f"members without a reader, and the samples that have them: {listed}" if kinds else ""


def _skip(file: BinaryIO, count: int, digest) -> None:
    """Read `count` bytes for the digest alone."""
    while count > 0 and (piece := file.read(min(count, PIECE))):
        digest.update(piece)
        count -= len(piece)
