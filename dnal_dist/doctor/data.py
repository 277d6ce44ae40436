"""Checks of the shards: that they are there, are what their index says, and hold what the recipe wants. No shard is read whole."""

import time
from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage

import numpy as np

from dnal_dist.common.errors import InputError
from dnal_dist.common.text import short
from dnal_dist.data import remote, shardlist
from dnal_dist.data.images import ImageError, Transform
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.shardlist import Url
from dnal_dist.data.shards import Shards
from dnal_dist.data.tar import Fault, Sample, parse
from dnal_dist.doctor.case import Case, Finding, fails, many, passes, refused, warns
from dnal_dist.training import preflight

# Samples whose labels are read, and that are decoded; of remote shards each is a request.
LABELS, IMAGES, REQUESTS = 512, 32, 4
# Seconds after which no further sample is asked for.
PATIENCE = 4.0


def train_shards(case: Case) -> Finding:
    return _shards(case, "train")


def val_shards(case: Case) -> Finding:
    return _shards(case, "val")


def _shards(case: Case, key: str) -> Finding:
    shards, data = case.splits[key], case.settings.data
    if isinstance(shards, InputError):
        return refused(shards)
    # Loaders would be counted against the cores of this machine, which need not be the one that trains.
    stream = Stream(shards, data.model_copy(update={"workers": 0}), case.settings.seed, key == "train", 0, case.ranks)
    found = f"{many(len(shards.paths), 'shard')}, {many(shards.samples, 'sample')}"
    if shards.warnings:
        more = f" (and {len(shards.warnings) - 1} more)" if len(shards.warnings) > 1 else ""
        first, _, remedy = shards.warnings[0].rpartition(": ")
        return fails(f"{first}{more}", f"{remedy}, then `python -m data_tools.verify`")
    if key == "train":
        preflight.search_without_architecture(case.settings, stream.steps_per_epoch)
        found += f", {many(stream.steps_per_epoch, 'step')} of {data.global_batch} an epoch"
    elif shards.samples < case.ranks:
        found += f", so that only {shards.samples} of {case.ranks} processes evaluate"
    without = [path for path, entry in zip(shards.paths, shards.entries, strict=True) if entry is None or not entry["sha256"]]
    if without:
        return warns(
            f"{found}; {without[0]} and {len(without) - 1} more have no index or digest, so every start reads all their headers",
            f"python -m data_tools.index {without[0].parent}",
        )
    if data.workers > stream.steps_per_epoch and key == "train":
        return warns(f"{found}, fewer than loader processes", f"lower key 'data.workers' from {data.workers}")
    return passes(f"{found}, with their index; sizes are as it says, digests were not read")


def labels(case: Case) -> Finding:
    """Of a sample of both sets, and the names of classes in the index."""
    known, read = case.classes, []
    for key in ("train", "val"):
        shards = case.splits[key]
        if isinstance(shards, InputError):
            return fails(f"not looked at, since the shards of data.{key} cannot be used", f"mend key 'data.{key}'")
        names = max((len(shardlist.class_names(folder)) for folder in {path.parent for path in shards.paths}), default=0)
        if names > known:
            return fails(f"the index of data.{key} names {names} classes, the network tells {known} apart", _classes(names))
        labels, bad, good = set(), [], 0
        for _, found in _some(shards, LABELS):
            if isinstance(found, Fault):
                bad.append(found)
            else:
                labels.add(found.label)
                good += 1
        if bad:
            told = f"data.{key}: {len(bad)} of {len(bad) + good} samples that were read cannot be used: {bad[0]}"
            tolerated = len(bad) <= case.settings.data.max_bad_fraction * (len(bad) + good)
            return (warns if tolerated else fails)(told, _mend(bad[0], known))
        read.append(f"{key}: {len(labels)} of {known} classes, labels {min(labels)} to {max(labels)}, in {good} samples read")
    return passes("; ".join(read))


def _classes(number: int) -> str:
    return f"set key 'model.num_classes' to {number}, or correct the shards"


def _mend(fault: Fault, known: int) -> str:
    if "out of range" in fault.reason:
        return f"raise key 'model.num_classes' above {known - 1}, or correct the shards (`python -m data_tools.verify` lists all)"
    return "make or copy the shard anew (`python -m data_tools.verify` lists all)"


def images(case: Case) -> Finding:
    """A sample of both sets goes through the recipe's own transforms on the CPU."""
    data, told = case.settings.data, []
    for key in ("train", "val"):
        shards = case.splits[key]
        if isinstance(shards, InputError):
            return fails(f"not looked at, since the shards of data.{key} cannot be used", f"mend key 'data.{key}'")
        transform, begun, good = Transform(data, case.settings.seed, key == "train"), time.monotonic(), 0
        for index, found in _some(shards, IMAGES):
            try:
                if isinstance(found, Fault):
                    raise found
                transform(found.image, 0, index)
            except (ImageError, Fault) as fault:
                where, begin = shards.where(index)
                return (warns if data.max_bad_fraction > 1 / IMAGES else fails)(
                    f"data.{key}: an image of the {good + 1} looked at is unusable: {where} at byte {begin}: "
                    f"{getattr(fault, 'reason', fault)}",
                    "`python -m data_tools.verify --decode` lists all; make them anew, or raise key 'data.max_bad_fraction'",
                )
            good += 1
        told.append(f"{key}: {good} decoded to {data.image_size}x{data.image_size} in {time.monotonic() - begun:.1f} s")
    return passes("; ".join(told))


def _some(shards: Shards, most: int) -> Iterator[tuple[int, Sample | Fault]]:
    """Samples spread over all shards, the first and the last among them, for as long as there is patience."""
    if shards.cache is not None:
        most = REQUESTS
    until = time.monotonic() + PATIENCE
    chosen = np.unique(np.linspace(0, shards.samples - 1, min(most, shards.samples)).round().astype(int)).tolist()
    # The last ones first: what is cut short or has too high a label is rather there.
    for index in [chosen[-1], *chosen[:-1]]:
        try:
            yield index, _sample(shards, index)
        except Fault as fault:
            yield index, fault
        if time.monotonic() > until:
            return


def _sample(shards: Shards, index: int) -> Sample:
    shard = int(shards.shard_of(np.array([index]))[0])
    if not isinstance(shards.paths[shard], Url):
        return shards[index]
    # A part of the remote file, where `shards` would fetch all of it.
    url, begin = shards.where(index)
    offsets = shards.offsets[shard]
    end = int(offsets[int(np.searchsorted(offsets, begin)) + 1])
    try:
        return parse(remote.read(url, begin, end), shards.num_classes)
    except Fault as fault:
        fault.shard, fault.offset, fault.index = url, begin, index
        raise


def cache(case: Case) -> Finding:
    """Room for the copies of remote shards on this machine."""
    found = [shards for shards in case.splits.values() if isinstance(shards, Shards)]
    wanted, data = sum(shards.remote_bytes for shards in found), case.settings.data
    if not wanted:
        return passes("no remote shards, so that no copies are made")
    folder = Path(data.cache).expanduser().absolute()
    there = sum(path.stat().st_size for path in folder.glob("*.tar")) if folder.is_dir() else 0
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free, room = disk_usage(place).free, min(wanted, int(data.cache_gb * 1e9))
    told = f"copies of up to {short(room)} of {short(wanted)} in {folder}, {short(there)} are there, {short(free)} are free"
    if free + there < room:
        return fails(told, "free some on each machine, name another key 'data.cache', or lower 'data.cache_gb'")
    return passes(told)
