"""Where the samples of a shard begin: from the index beside it, or from the headers of a local one."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dnal_dist.common.errors import InputError
from dnal_dist.data.shardlist import Url
from dnal_dist.data.tar import boundaries, compressed


def sample_offsets(path: Path | Url, entry: dict | None, key: str) -> tuple[np.ndarray, list[str]]:
    """The byte at which each sample of a shard begins and, as the last number, the end of the last one; and warnings of what is
    wrong with the shard, but does not keep its samples from being used. entry: of the shard in its index, if there is one.

    Raises InputError, naming the recipe's `key`, for a shard that cannot be read or is not what the index says.
    """
    if isinstance(path, Url):
        if entry is None or entry["offsets"] is None or not entry["sha256"]:
            raise InputError(
                f"{path.parent}/index.json: has no offsets or digest of {path.name}, which a remote shard needs; "
                f"make the index of a local copy with `python -m data_tools.index`, and put it beside the shards"
            )
        return np.array(entry["offsets"], dtype=np.int64), []
    try:
        if not path.is_file():
            raise InputError(f"{path}: not a file; correct key '{key}'")
        with path.open("rb") as file:
            if entry is None or entry["offsets"] is None:
                return _scanned(path, file, entry)
            return _indexed(path, file.seek(0, io.SEEK_END), entry)
    except OSError as error:
        raise InputError(f"{path}: shard cannot be read ({error.strerror}); check the file and key '{key}'") from None


def _indexed(path: Path, size: int, entry: dict) -> tuple[np.ndarray, list[str]]:
    found = f"{path}: holds {size} bytes, index.json says {entry['bytes']}"
    if size > entry["bytes"]:
        raise InputError(f"{found}; make or copy the shard again")
    offsets = np.array(entry["offsets"], dtype=np.int64)
    lost = int((offsets[1:] > size).sum())
    return offsets, [f"{found}; its last {lost} samples are lost: copy it again"] if lost else []


def _scanned(path: Path, file: BinaryIO, entry: dict | None) -> tuple[np.ndarray, list[str]]:
    offsets, faults = boundaries(file)
    count = len(offsets) - 1
    if not count and (remedy := compressed(file)):
        raise InputError(f"{path}: {remedy}")
    if not count and faults:
        raise InputError(f"{path}: not a readable tar shard ({faults[0][1]}); make or copy it again")
    if entry is not None and entry["samples"] not in (0, count):
        raise InputError(f"{path}: holds {count} samples, index.json says {entry['samples']}; make the index again")
    warnings = [f"{path}: at byte {at}: {reason}; {count} samples were found: copy or make it again" for at, reason in faults]
    return np.array(offsets, dtype=np.int64), warnings
