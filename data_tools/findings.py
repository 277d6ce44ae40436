"""Findings about a set of shards, and the summary of its splits, from surveys of all of them."""

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.survey import Survey
from dnal_dist.data.decoding import ImageError, decode
from dnal_dist.data.samples import Fault
from dnal_dist.data.shardlist import Url


class Finding(NamedTuple):
    kind: str
    where: str
    what: str


# Samples of the largest class for one of the smallest, from which on a split is called imbalanced.
IMBALANCE = 10
MOST_COLOURS = 500
# Words in a name that mark its split.
TRAINING = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)
ANY_SPLIT = re.compile(r"(?<![a-z])(train(ing)?|val(id|idation)?|test(ing)?|dev|eval)(?![a-z])", re.IGNORECASE)


def _stem(path: Path | Url) -> str:
    """A shard's name without its number: train for train-000012.tar and train-000012-of-000147.tar, nothing for 000012.tar."""
    return re.sub(r"([-_.]?\d+)?([-_.]of[-_.]\d+)?$", "", path.name.removesuffix(".tar"))


def by_split(surveys: Sequence[Survey]) -> dict[str, list[Survey]]:
    """The shards of each split, by the name of the shards; with their folder's where only that differs, as in train/shard-000.tar
    and val/shard-000.tar."""
    folders = defaultdict(set)
    for one in surveys:
        folders[_stem(one.path)].add(one.path.parent)
    found = defaultdict(list)
    for one in surveys:
        stem, folder = _stem(one.path), one.path.parent.name
        alone = ANY_SPLIT.search(stem) or len(folders[stem]) == 1
        found[(stem if alone else f"{folder}/{stem}") if stem else folder].append(one)
    return dict(found)


def _is_training(path: Path | Url) -> bool:
    stem = _stem(path)
    return bool(TRAINING.search(stem if ANY_SPLIT.search(stem) else path.parent.name))


def shard_findings(surveys: Sequence[Survey], index: dict[Path | Url, dict | None], missing: Sequence[str]) -> Iterator[Finding]:
    """Shards that are missing, damaged or differ from their entry in `index` (None without one); samples that training skips."""
    for path in missing:
        yield Finding("index", path, "no such shard, but index.json lists it; copy it here or make the index again")
    for one in surveys:
        known = index[one.path]
        if known is None:
            yield Finding("index", str(one.path), "not in any index; python -m data_tools.index makes one")
        else:
            for name in ("bytes", "sha256", "samples", "offsets"):
                if known[name] is not None and known[name] != one.entry[name]:
                    yield Finding("digest", str(one.path), _difference(name, known, one.entry))
                    break
            else:
                if known["labels"] is not None and known["labels"].tolist() != one.entry["labels"]:
                    yield Finding("label", str(one.path), "has other labels than index.json says; make the index again")
        for byte, reason in one.damage:
            yield Finding("damage", f"{one.path}: byte {byte}", reason)
        for key, reason in one.faults:
            yield Finding("sample", f"{one.path}: {key}", reason)


def _difference(name: str, known: dict, entry: dict) -> str:
    if name == "offsets":
        return "its samples begin at other bytes than index.json says; make the index again"
    unit = {"bytes": "bytes", "samples": "samples", "sha256": "as SHA-256"}[name]
    return f"has {entry[name]} {unit}, index.json says {known[name]}; copy or make it again"


def label_findings(splits: dict[str, list[Survey]], classes: Sequence[str] | None) -> Iterator[Finding]:
    """Labels outside the classes, and classes without a training sample."""
    if classes is None:
        return
    for surveys in splits.values():
        for one in surveys:
            for good in one.good:
                if good.label >= len(classes):
                    yield Finding("label", f"{one.path}: {good.key}", f"label {good.label} is outside the {len(classes)} classes")
    training = [one for surveys in splits.values() for one in surveys if _is_training(one.path)]
    for number in np.flatnonzero(_per_class(training, len(classes)) == 0).tolist() if training else ():
        yield Finding("class", f"class {number} ({classes[number]})", "has no training sample")


def _per_class(surveys: Sequence[Survey], classes: int) -> np.ndarray:
    labels = np.array([good.label for one in surveys for good in one.good if good.label < classes], dtype=np.int64)
    return np.bincount(labels, minlength=classes)


def duplicate_findings(splits: dict[str, list[Survey]]) -> Iterator[Finding]:
    """Keys that a split has twice; the same image, byte for byte, in two splits or with two labels. The same image twice in a
    split with one label is only counted, by `summary`, since many good sets have some."""
    for surveys in splits.values():
        first: dict[str, Path | Url] = {}
        for one in surveys:
            for good in one.good:
                if good.key in first:
                    yield Finding("key", f"{one.path}: {good.key}", f"the same key as in {first[good.key]}")
                first.setdefault(good.key, one.path)
    for group in same_images(splits):
        (split, one, good), *others = group
        for other_split, other, duplicate in others:
            where, what = f"{other.path}: {duplicate.key}", f"the same image as {one.path}: {good.key}"
            if other_split != split:
                yield Finding("leak", where, f"{what}, in another split")
            elif duplicate.label != good.label:
                yield Finding("label", where, f"{what}, of label {good.label} there and {duplicate.label} here")


def same_images(splits: dict[str, list[Survey]]) -> list[list[tuple]]:
    """Groups of (split, survey, sample) that hold the same image, byte for byte, in the order of the shards."""
    counts = Counter(good.digest for surveys in splits.values() for one in surveys for good in one.good)
    groups = defaultdict(list)
    for split, surveys in splits.items():
        for one in surveys:
            for good in one.good:
                if counts[good.digest] > 1:
                    groups[good.digest].append((split, one, good))
    return list(groups.values())


def summary(splits: dict[str, list[Survey]], classes: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """For each split: shards, samples, bytes, faulty samples, samples whose image it has twice, members without a reader by kind,
    samples of each class and as (least, median, most), and of the decoded images width and height likewise and how many have an
    alpha channel."""
    repeated = defaultdict(int)
    for group in same_images(splits):
        for split in {member[0] for member in group}:
            repeated[split] += sum(member[0] == split for member in group) - 1
    found = {}
    for split, surveys in splits.items():
        count = len(classes) if classes is not None else 1 + max((g.label for one in surveys for g in one.good), default=-1)
        headers = [header for one in surveys for header in one.headers]
        sizes = np.array([(header.width, header.height) for header in headers])
        per_class = _per_class(surveys, count)
        found[split] = {
            "shards": len(surveys),
            "samples": sum(one.entry["samples"] for one in surveys),
            "bytes": sum(one.entry["bytes"] for one in surveys),
            "faulty": sum(len(one.faults) for one in surveys),
            "same_picture": repeated[split],
            "unread": dict(sum((one.unread for one in surveys), Counter())),
            "classes": count,
            "per_class": _spread(per_class),
            "class_counts": per_class.tolist(),
            "with_alpha": sum(header.alpha for header in headers) if headers else None,
            "width": _spread(sizes[:, 0]) if len(sizes) else None,
            "height": _spread(sizes[:, 1]) if len(sizes) else None,
        }
    return found


def balance(summary: dict[str, dict[str, Any]], classes: Sequence[str]) -> Iterator[str]:
    """A line for each split that has far more samples of one class than of another: accuracy alone then says little."""
    for split, found in summary.items():
        counts = found["class_counts"]
        least, most = (min(counts), max(counts)) if counts else (0, 0)
        if most >= IMBALANCE * max(least, 1):
            few, many = (
                f"{(at := counts.index(one))}" + (f" ({classes[at]})" if at < len(classes) else "") for one in (least, most)
            )
            yield f"{split}: {least:,} samples of class {few}, {most:,} of class {many}"


def colours(splits: dict[str, list[Survey]]) -> tuple[list[float], list[float], int] | None:
    """Mean and standard deviation of red, green and blue, in 0..1, and the number of training images that they are of, up to
    MOST_COLOURS spread over all local shards; every image counts alike, whatever its size. None without such images."""
    local = [one for surveys in splits.values() for one in surveys if not isinstance(one.path, Url)]
    chosen = [one for one in local if _is_training(one.path)] or local
    samples = [(one, good) for one in chosen for good in one.good]
    sums = []
    for one, good in samples[:: max(1, len(samples) // MOST_COLOURS)]:
        with contextlib.suppress(OSError, Fault, ImageError):  # what is wrong with it is a finding
            pixels = decode(one.image(good)) / 255
            sums.append([pixels.mean((0, 1)), (pixels**2).mean((0, 1))])
    if not sums:
        return None
    mean, square = np.mean(sums, 0)
    return mean.round(3).tolist(), np.sqrt(square - mean**2).round(3).tolist(), len(sums)


def _spread(values: np.ndarray) -> tuple[int, float, int] | None:
    return (int(values.min()), float(np.median(values)), int(values.max())) if len(values) else None
