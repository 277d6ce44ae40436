"""Writing of shards and their index, by several processes, the same bytes every time."""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.record import Record, naming
from data_tools.workers import Tick, as_finished

INDEX_VERSION = 1

Sample = tuple[str, bytes, str, int]
"""Key, encoded image, its extension, label."""


class Split(NamedTuple):
    references: Sequence
    """The source of each sample. Workers get those of their shards, so they must be picklable."""
    draw: Callable[[int, Any], Sample]
    """Makes a sample from its number in the split and its reference; picklable too."""
    shards: int


class Shard(NamedTuple):
    path: Path
    first: int
    references: Sequence
    draw: Callable[[int, Any], Sample]
    known: dict | None
    """Its index entry, if an earlier run has completed it."""


def shards_for(samples: int, shard_samples: int) -> int:
    return math.ceil(samples / shard_samples)


def write(
    record: Record, splits: dict[str, Split], classes: Sequence[str], workers: int = 1, skipped: Sequence[dict] = ()
) -> dict[str, int]:
    """Write the shards of all splits, then their index, to `record.folder`; `skipped` to skipped.json there.

    Shards of a split differ by one sample at most. The same samples give the same bytes, with any number of workers. A shard gets
    its name only when it is complete. Returns the number of samples of each split. Raises ValueError or OSError.
    """
    folder = record.folder
    shards = [shard for name, split in splits.items() for shard in _layout(folder, name, split, record)]
    counts = {name: len(split.references) for name, split in splits.items()}
    entries: dict[int, dict] = {}
    record.begin()
    for number, entry in as_finished(make, shards, workers, "shards", sum(counts.values())):
        record.add(entry)
        entries[number] = entry
    if skipped:
        with naming(folder / "skipped.json"):
            (folder / "skipped.json").write_text(json.dumps({"skipped": list(skipped)}, indent=1) + "\n")
    write_index(folder / "index.json", [entries[number] for number in range(len(shards))], classes)
    record.finish()
    return counts


def _layout(folder: Path, name: str, split: Split, record: Record) -> list[Shard]:
    shards, (each, more), first = [], divmod(len(split.references), split.shards), 0
    for number in range(split.shards):
        path, count = folder / f"{name}-{number:06d}.tar", each + (number < more)
        known = record.shards.get(path.name)
        shards.append(Shard(path, first, split.references[first : first + count], split.draw, known))
        first += count
    return shards


def make(shard: Shard, tick: Tick) -> dict:
    """Write one shard, or keep it if an earlier run has completed it. Returns its index entry."""
    path, known = shard.path, shard.known
    if known and path.exists() and path.stat().st_size == known["bytes"] and sha256(path) == known["sha256"]:
        tick(len(shard.references))
        return known
    unfinished = shard.path.with_suffix(".tar.unfinished")
    try:
        with naming(shard.path), unfinished.open("wb") as file:
            entry = _write_tar(file, shard, tick)
        os.replace(unfinished, shard.path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return entry


def _write_tar(file: io.BufferedWriter, shard: Shard, tick: Tick) -> dict:
    # Imports torch: 2.4 s and 280 MB in each process that writes, which no other process should pay.
    from webdataset import TarWriter

    out, offsets, labels = _Digesting(file), [0], []
    # A fixed time, or the same samples would give other bytes.
    with TarWriter(out, encoder=False, mtime=0) as writer:
        for number, reference in enumerate(shard.references, shard.first):
            key, image, extension, label = shard.draw(number, reference)
            writer.write({"__key__": key, extension: image, "cls": str(label).encode()})
            offsets.append(writer.tarstream.offset)
            labels.append(label)
            tick(1)
    return {
        "file": shard.path.name,
        "samples": len(shard.references),
        "bytes": out.size,
        "sha256": out.sha256.hexdigest(),
        "offsets": offsets,
        "labels": labels,
    }


class _Digesting:
    """A file that is hashed while it is written."""

    def __init__(self, file: io.BufferedWriter):
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> None:
        self.file.write(content)
        self.sha256.update(content)
        self.size += len(content)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_index(path: Path, entries: Iterable[dict], classes: Sequence[str]) -> None:
    """Write the index, a line a shard: samples, bytes, SHA-256, the samples' offsets and the last one's end, and their labels."""
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries)
    unfinished = path.with_name(path.name + ".unfinished")
    head = f'{{"version": {INDEX_VERSION},\n"classes": {json.dumps(list(classes))},\n'
    with naming(path):
        unfinished.write_text(f'{head}"shards": [\n{lines}\n]}}\n')
    os.replace(unfinished, path)
