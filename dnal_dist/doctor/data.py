"""Checks of the shards: they exist, match their index, and have what the recipe needs. No shard is read whole."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from shutil import disk_usage

import numpy as np

from dnal_dist.common.errors import InputError
from dnal_dist.common.paths import expanded
from dnal_dist.common.text import short
from dnal_dist.data import remote
from dnal_dist.data.decoding import ImageError
from dnal_dist.data.images import Transform
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.samples import Fault, Sample, parse
from dnal_dist.data.shards import Shards
from dnal_dist.doctor.case import Case, Finding, fails, many, nearest, passes, warns
from dnal_dist.training import preflight

# Samples whose labels are read, and whose images are decoded; of remote shards, where each is a request, REQUESTS.
LABELS, IMAGES, REQUESTS = 512, 32, 4
# Seconds after which no further sample is read.
PATIENCE = 4.0
REBUILD = "make or copy the shards again (`python -m data_tools.verify` lists all)"


def _shards(case: Case, key: str) -> Finding:
    shards, data = case.splits[key], case.settings.data
    if isinstance(shards, InputError):
        raise shards
    # Without workers, which would be compared with the cores of this machine rather than of the one that trains.
    stream = Stream(shards, data.model_copy(update={"workers": 0}), case.settings.seed, key == "train", 0, case.ranks)
    found = f"{many(len(shards.paths), 'shard')}, {many(shards.samples, 'sample')}"
    if shards.warnings:
        more = f" (and {len(shards.warnings) - 1} more)" if len(shards.warnings) > 1 else ""
        first, _, remedy = shards.warnings[0].rpartition(": ")
        return fails(f"{first}{more}", f"{remedy}, then `python -m data_tools.verify`")
    if key == "train":
        preflight.check_search_length(case.settings, stream.steps_per_epoch)
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
    return passes(f"{found}, with their index; sizes match it, digests were not read")


train_shards, val_shards = (partial(_shards, key=key) for key in ("train", "val"))


def labels(case: Case) -> Finding:
    """Labels of some samples of both splits, and the class names of the index."""
    known, read = case.classes, []
    unlike = preflight.class_warnings([case.shards("train"), case.shards("val")], known)
    for key in ("train", "val"):
        shards = case.shards(key)
        samples = [sample for _, sample in _some(shards, LABELS)]
        if bad := [sample for sample in samples if isinstance(sample, Fault)]:
            tolerated = len(bad) <= case.settings.data.max_bad_fraction * len(samples)
            return (warns if tolerated else fails)(
                f"data.{key}: {len(bad)} of {len(samples)} samples that were read cannot be used: {bad[0]}",
                f"raise key 'model.num_classes' above {known - 1}, or {REBUILD}" if "out of range" in bad[0].reason else REBUILD,
            )
        seen = {sample.label for sample in samples}
        read.append(f"{key}: {len(seen)} of {known} classes, labels {min(seen)} to {max(seen)}, in {len(samples)} samples read")
    if unlike:
        found, _, remedy = unlike[0].rpartition("; ")
        return warns(found, remedy)
    return passes("; ".join(read))


def images(case: Case) -> Finding:
    """Some images of both splits, through the recipe's own transforms on the CPU."""
    data, decoded = case.settings.data, []
    for key in ("train", "val"):
        shards = case.shards(key)
        transform, begun, good = Transform(data, case.settings.seed, key == "train"), time.monotonic(), 0
        for index, sample in _some(shards, IMAGES):
            try:
                if isinstance(sample, Fault):
                    raise sample
                transform(sample.image, 0, index)
            except (ImageError, Fault) as fault:
                where, begin = shards.where(index)
                return (warns if data.max_bad_fraction > 1 / IMAGES else fails)(
                    f"data.{key}: one of {good + 1} images is unusable: {where} at byte {begin}: {getattr(fault, 'reason', fault)}",
                    "`python -m data_tools.verify --decode` lists all; make them again, or raise key 'data.max_bad_fraction'",
                )
            good += 1
        decoded.append(f"{key}: {good} decoded to {data.image_size}x{data.image_size} in {time.monotonic() - begun:.1f} s")
    return passes("; ".join(decoded))


def _some(shards: Shards, most: int) -> Iterator[tuple[int, Sample | Fault]]:
    """Samples spread over all shards, the first and the last among them, for PATIENCE seconds."""
    if shards.cache is not None:
        most = REQUESTS
    until = time.monotonic() + PATIENCE
    chosen = np.unique(np.linspace(0, shards.samples - 1, min(most, shards.samples)).round().astype(int)).tolist()
    # The last one first: truncation and labels out of range are more likely there.
    for index in [chosen[-1], *chosen[:-1]]:
        try:
            yield index, _sample(shards, index)
        except Fault as fault:
            yield index, fault
        if time.monotonic() > until:
            return


def _sample(shards: Shards, index: int) -> Sample:
    shard, begin, end = shards.locate(index)
    if shard not in shards.remote:
        return shards[index]
    # One range of the remote file, where `shards` would fetch all of it.
    url = shards.paths[shard]
    try:
        return parse(remote.read(url, begin, end), shards.formats[url.parent])
    except Fault as fault:
        fault.shard, fault.offset, fault.index = url, begin, index
        raise


def cache(case: Case) -> Finding:
    """Room for the copies of remote shards on this machine."""
    wanted, data = sum(shards.remote_bytes for shards in case.usable), case.settings.data
    if not wanted:
        return passes("no remote shards, so no copies")
    folder = Path(expanded(data.cache, "key 'data.cache': ")).absolute()
    cached = sum(path.stat().st_size for path in folder.glob("*.tar")) if folder.is_dir() else 0
    free, room = disk_usage(nearest(folder)).free, min(wanted, int(data.cache_gb * 1e9))
    found = f"copies of up to {short(room)} of {short(wanted)} in {folder}, {short(cached)} are there, {short(free)} are free"
    if free + cached < room:
        return fails(found, "free some on each machine, change key 'data.cache', or lower 'data.cache_gb'")
    return passes(found)
