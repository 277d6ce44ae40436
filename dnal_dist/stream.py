"""Shards in, batches out, in one global order that ranks and workers only divide.

The order of samples is a function of seed and epoch. Batch b of an epoch is a slice of that order, and a rank's part of it a slice
of the slice, so any number of ranks and workers sees the same batches and a run can go on from any of them. A loader worker opens a
shard, reads its headers once, and from then on reads each picture by its offset. Only pictures and class numbers are read; nothing
that a shard holds is ever executed or unpickled.
"""

import glob
import json
import os
import shlex
import signal
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from webdataset.shardlists import expand_urls

from dnal_dist import nvjpeg
from dnal_dist.nvjpeg import Encoded
from dnal_dist.pictures import PictureError, Stack, Transform, read_header, render
from dnal_dist.recipe import InputError

PICTURES = ("png", "jpg", "jpeg")
OPEN_SHARDS = 64


class Sample(NamedTuple):
    key: str
    offset: int
    size: int
    label: int


class Batch(NamedTuple):
    """images uint8 (n, 3, H, W), labels int64 (n,), which images are to be mirrored (bool (n,)), the samples' keys, and what was
    skipped and why ("shard: sample: reason"). encoded: JPEGs that the device is to decode; `images` are then only the others."""

    images: Tensor
    labels: Tensor
    flips: Tensor
    keys: list[str]
    bad: list[str]
    encoded: Encoded | None = None


class Shards:
    """The shards of one split: `paths`, and how many samples each holds, from index.json beside them or else by reading headers."""

    def __init__(self, patterns: str, key: str, num_classes: int):
        self.key, self.num_classes = key, num_classes
        names, self.paths = _expand(patterns, key)
        indices = {folder: _read_index(folder) for folder in {path.parent for path in self.paths}}
        _refuse_gaps(indices, names, self.paths)
        self.counts = [self._check(path, indices[path.parent].get(path.name)) for path in self.paths]
        self.samples = sum(self.counts)
        if not self.samples:
            raise InputError(f"key '{key}': {patterns!r} matches shards that hold no sample; make them anew")
        self._ends = np.cumsum(self.counts)
        self._headers: dict[int, np.ndarray] = {}
        self._files: OrderedDict[int, int] = OrderedDict()

    def _check(self, path: Path, entry: dict | None) -> int:
        try:
            if not path.is_file():
                raise InputError(f"{path}: not a file; correct key '{self.key}'")
            size = path.stat().st_size
            if entry is None or not entry["samples"]:
                return len(scan(path, self.num_classes))
            if size != entry["bytes"]:
                raise InputError(f"{path}: holds {size} bytes, index.json says {entry['bytes']}; make or copy the shard anew")
            with path.open("rb"):
                return entry["samples"]
        except OSError as error:
            raise InputError(f"{path}: shard cannot be read ({error.strerror}); check the file and key '{self.key}'") from None

    def __getitem__(self, index: int) -> tuple[Path, Sample, bytes]:
        """Shard, sample and encoded picture of the sample with this number, 0 <= index < samples."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        headers = self._headers_of(shard)
        row = index - (self._ends[shard] - self.counts[shard])
        sample = Sample(headers["key"][row].decode(), *(int(headers[name][row]) for name in ("offset", "size", "label")))
        return self.paths[shard], sample, os.pread(self._open(shard), sample.size, sample.offset)

    def _headers_of(self, shard: int) -> np.ndarray:
        """One row for each sample: read once, and small enough to be kept for millions of them."""
        if shard not in self._headers:
            path = self.paths[shard]
            samples = scan(path, self.num_classes)
            if len(samples) != self.counts[shard]:
                raise InputError(f"{path}: holds {len(samples)} samples, index.json says {self.counts[shard]}; make the index anew")
            rows = [(sample.key.encode(), *sample[1:]) for sample in samples]
            longest = max(len(row[0]) for row in rows)
            self._headers[shard] = np.array(rows, [("key", f"S{longest}"), ("offset", "i8"), ("size", "i8"), ("label", "i4")])
        return self._headers[shard]

    def _open(self, shard: int) -> int:
        """A file descriptor of the shard; the OPEN_SHARDS used last stay open."""
        if shard not in self._files:
            if len(self._files) == OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]


def _expand(patterns: str, key: str) -> tuple[list[str], list[Path]]:
    """The paths and path patterns that `patterns` stands for once its braces are expanded, and the files they match."""
    names, paths = [], []
    for pattern in _words(patterns, key):
        if pattern.startswith("pipe:") or "://" in pattern:
            raise InputError(f"key '{key}': {pattern!r} is not a local path; shards are read from local files only")
        try:
            expanded = expand_urls(pattern)
        except (ValueError, AssertionError) as error:
            raise InputError(f"key '{key}': {pattern!r} is not a pattern ({error}); correct it") from None
        found = {one: sorted(glob.glob(one)) for one in expanded}
        # A shard that is named in full must be there; of a pattern with wildcards, one match is enough.
        missing = [one for one in expanded if not found[one] and not glob.has_magic(one)]
        if missing or not any(found.values()):
            raise InputError(
                f"key '{key}': no shard matches {missing[0] if missing else pattern!r}; make shards with "
                f"`python -m data_tools.make_shards` (for the demo: `python -m data_tools.make_shards digits data/digits`) "
                f"or correct the pattern (a path with blanks wants quotes of its own)"
            )
        names += expanded
        paths += [Path(path) for one in expanded for path in found[one]]
    if not paths:
        raise InputError(f"key '{key}': expected the path of shards, found {patterns!r}")
    return names, paths


def _words(patterns: str, key: str) -> list[str]:
    try:
        return shlex.split(patterns)
    except ValueError as error:
        raise InputError(f"key '{key}': {patterns!r} cannot be divided into patterns ({error}); mend its quotes") from None


def _refuse_gaps(indices: dict[Path, dict[str, dict]], names: list[str], paths: list[Path]) -> None:
    """Raise InputError if an index tells of a shard that `names` asks for and that is not there."""
    for folder, index in indices.items():
        for path in (folder / file for file in index):
            if path not in paths and any(fnmatch(str(path), str(Path(name))) for name in names):
                raise InputError(f"{path}: no such shard, but index.json tells of it; copy it here or make the index anew")


def _read_index(folder: Path) -> dict[str, dict]:
    try:
        entries = json.loads((folder / "index.json").read_text())["shards"]
        index = {entry["file"]: {"samples": int(entry["samples"]), "bytes": int(entry["bytes"])} for entry in entries}
        if any(entry["samples"] < 0 for entry in index.values()):
            raise ValueError("a negative number of samples")
        return index
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / 'index.json'}: not an index of shards ({error!r}); remove it or make it anew") from None


def scan(path: Path, num_classes: int | None = None) -> list[Sample]:
    """The samples of the webdataset shard at `path`, from its headers and class members; pictures are not read.

    Raises InputError for a file that is no tar or is cut short, a sample without picture or class or with two of either, and a
    label outside [0, num_classes).
    """
    try:
        found = _members(path)
    except OSError:
        raise
    except Exception as error:  # of many kinds, where a header means harm
        raise InputError(f"{path}: not a readable tar shard ({error}); make or copy it anew") from None
    samples = []
    for key, parts in found.items():
        # Messages show the key, and it may hold what moves a terminal's cursor.
        key = key if key.isprintable() else repr(key)[1:-1]
        if len(parts["picture"]) != 1 or len(parts["label"]) != 1:
            raise InputError(
                f"{path}: sample {key}: expected one picture ({', '.join(PICTURES)}) and one class (cls), found "
                f"{len(parts['picture'])} and {len(parts['label'])}; make the shard anew"
            )
        text = parts["label"][0].decode("ascii", "replace").strip()
        if not text.isdigit() or (num_classes is not None and int(text) >= num_classes):
            bound = f" from 0 to {num_classes - 1} (model.num_classes is {num_classes})" if num_classes else ""
            raise InputError(f"{path}: sample {key}: label {text!r} is out of range, expected a whole number{bound}")
        samples.append(Sample(key, *parts["picture"][0], int(text)))
    return samples


def _members(path: Path) -> dict[str, dict[str, list]]:
    """Of each key in the tar at `path`: where its pictures lie, as (offset, size), and its labels."""
    found: dict[str, dict[str, list]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.size < 0:
                raise tarfile.TarError("a member of negative size")
            if not member.isfile() or member.issparse():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            parts = found.setdefault(f"{folder}/{stem}" if folder else stem, {"picture": [], "label": []})
            if extension.lower() in PICTURES:
                parts["picture"].append((member.offset_data, member.size))
            elif extension == "cls":
                parts["label"].append(tar.extractfile(member).read(20))
        # tarfile takes a damaged header, or the file's end, for the end of the archive. The true one is a block of zeros.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.TarError("cut short or damaged behind its last whole member")
    return found


def order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the sample numbers 0 ... samples - 1 in an epoch: a uniform shuffle, a function of its arguments alone."""
    # NumPy promises that raw bits stay the same from version to version; it does not promise that for `permutation`.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(samples)
    return np.argsort(bits, kind="stable")


class Pictures(Dataset):
    """Decoded pictures by (epoch, sample number). A list of them gives a Batch, or the InputError that stops the run, as a value:
    an exception would arrive from a loader process as a page of traceback."""

    def __init__(self, shards: Shards, data, seed: int, train: bool):
        self.shards, self.train, self.size, self.transform = shards, train, data.image_size, Transform(data, seed, train)
        self.on_device = train and data.decode == "cuda"

    def __getitems__(self, wanted: list[tuple[int, int]]) -> Batch | InputError:
        stack, waiting, labels, flips, keys, bad = Stack(len(wanted), self.size), nvjpeg.Waiting(), [], [], [], []
        try:
            for epoch, index in wanted:
                path, sample, encoded = self.shards[index]
                try:
                    header = read_header(encoded)
                    geometry = self.transform.plan(header, epoch, index)
                    if self.on_device and nvjpeg.takes(header, encoded):
                        waiting.add(encoded, len(labels), geometry, f"{path}: sample {sample.key}")
                    else:
                        render(encoded, header, geometry, stack.next)
                        stack.keep()
                except PictureError as error:
                    bad.append(f"{path}: sample {sample.key}: {error}")
                    continue
                labels.append(sample.label)
                flips.append(geometry.flip)
                keys.append(sample.key)
        except InputError as error:
            return error
        except OSError as error:
            return InputError(f"{error.filename or path}: shard cannot be read any more ({error.strerror}); check the file")
        if self.train and not labels:
            # BatchNorm's statistics of no picture at all would be no numbers.
            return InputError(f"{bad[0]}: no picture of a batch of {len(wanted)} can be decoded; mend the shards")
        labels, flips = torch.tensor(labels, dtype=torch.long), torch.tensor(flips, dtype=torch.bool)
        return Batch(stack.images, labels, flips, keys, bad, waiting.encoded() if self.on_device else None)


class _Slices(Sampler):
    """Which samples each batch of one rank holds. Training: without end, from batch `start` of the run on. Else: one pass."""

    def __init__(self, samples: int, global_batch: int, rank: int, world_size: int, seed: int, train: bool):
        self.samples, self.global_batch, self.seed, self.train = samples, global_batch, seed, train
        self.rank, self.world_size, self.local = rank, world_size, global_batch // world_size
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if not self.train:
            mine = range(self.rank, self.samples, self.world_size)
            yield from ([(0, i) for i in mine[b : b + self.local]] for b in range(0, len(mine), self.local))
            return
        per_epoch = self.samples // self.global_batch
        epoch, batch = divmod(self.start, per_epoch)
        while True:
            shuffled = order(self.samples, self.seed, epoch)
            for first in range(batch * self.global_batch, per_epoch * self.global_batch, self.global_batch):
                mine = shuffled[first + self.rank * self.local :][: self.local]
                yield [(epoch, int(i)) for i in mine]
            epoch, batch = epoch + 1, 0


class Stream:
    """The batches that one rank of `world_size` gets from `shards`.

    `batches(start)` of a training stream goes on without end from iteration `start` of the run; of a validation stream it is one
    pass in which every sample is seen once by exactly one rank. pin: batches in page-locked memory, for a GPU. Raises InputError
    where the data is at fault.
    """

    def __init__(self, shards: Shards, data, seed: int, train: bool, rank: int = 0, world_size: int = 1, pin: bool = False):
        if data.global_batch % world_size:
            raise InputError(
                f"key 'data.global_batch': {data.global_batch} pictures cannot be divided evenly among {world_size} processes; "
                f"the nearest that can is {max(1, round(data.global_batch / world_size)) * world_size}"
            )
        self.shards, self.samples = shards, shards.samples
        self.steps_per_epoch, self.dropped = divmod(self.samples, data.global_batch)
        if train and not self.steps_per_epoch:
            raise InputError(
                f"key 'data.global_batch': a step takes {data.global_batch} pictures, but '{shards.key}' holds {self.samples}; "
                f"lower it or add shards"
            )
        self._slices = _Slices(self.samples, data.global_batch, rank, world_size, seed, train)
        self._loader = DataLoader(
            Pictures(shards, data, seed, train),
            batch_sampler=self._slices,
            num_workers=data.workers,
            collate_fn=_as_it_is,
            pin_memory=pin,
            persistent_workers=data.workers > 0,
            worker_init_fn=_begin_loader,
        )

    def batches(self, start: int = 0) -> Iterator[Batch]:
        self._slices.start = start
        for batch in self._loader:
            if isinstance(batch, InputError):
                raise InputError(str(batch), local=True)
            yield batch


def _as_it_is(batch):
    return batch


def _begin_loader(_worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes of a terminal; what becomes of a loader is for the process that it loads for to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
