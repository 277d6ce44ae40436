"""The one global order: the same for any ranks and workers, shuffled well, resumable anywhere."""

import itertools
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
from faulty import png, refused, write_tar

from data_tools import index
from dnal_dist.common.errors import InputError
from dnal_dist.data import downloads, offsets
from dnal_dist.data import order as data_order
from dnal_dist.data.order import GlobalOrder, order_with_locality
from dnal_dist.data.pipeline import Decoder, Stream
from dnal_dist.data.shards import Shards
from dnal_dist.recipe import Data


def settings(digits, **changes) -> Data:
    data = {"train": f"{digits}/train-*.tar", "val": f"{digits}/val-*.tar", "image_size": 8, "global_batch": 48, "workers": 0}
    return Data(**data | changes)


def keys(data: Data, start: int, count: int, world_size: int = 1, train: bool = True) -> list[list[str]]:
    """Keys of the global batches `start` ... `start + count` - 1, put together from all ranks."""
    found = Shards(data.train if train else data.val, "data.train", 10)
    parts = []
    for rank in range(world_size):
        batches = Stream(found, data, 0, train, rank, world_size).batches(start)
        parts.append([next(batches).keys for _ in range(count)])
        batches.close()
    return [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def reference(digits) -> dict[int | None, list[list[str]]]:
    """Two epochs and a bit on one rank without workers, by shuffle_shards."""
    return {together: keys(settings(digits, shuffle_shards=together), 0, 64) for together in (None, 2)}


@pytest.mark.parametrize(
    ("world_size", "workers", "together"), [(1, 4, 2), (2, 1, None), (3, 2, 2), (4, 0, None), (8, 0, 2), (8, 4, None)]
)
def test_global_batches_are_the_same_sets_in_the_same_sequence(digits, reference, world_size, workers, together):
    """Across the end of an epoch."""
    data = settings(digits, workers=workers, shuffle_shards=together)
    assert keys(data, 27, 6, world_size) == reference[together][27:33]


@pytest.mark.parametrize("together", [None, 2, 3])
def test_an_epoch_has_every_sample_once(digits, together):
    data = settings(digits, global_batch=1, shuffle_shards=together)
    found = Shards(data.train, "data.train", 10)
    orders = [GlobalOrder(found, data, seed, True).epoch(epoch) for seed in range(3) for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(1442)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 9


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 2), (8, 0)])
def test_validation_drops_nothing_and_repeats_nothing(digits, world_size, workers):
    data = settings(digits, workers=workers)
    found = Shards(data.val, "data.val", 10)
    streams = [Stream(found, data, 0, False, rank, world_size) for rank in range(world_size)]
    for _ in range(2):
        seen = [key for one in streams for batch in one.batches() for key in batch.keys]
        assert len(seen) == len(set(seen)) == 355


def test_eight_ranks_divide_one_shard(tmp_path):
    members = {f"{i:02}.{kind}": content for i in range(35) for kind, content in (("png", png(i)), ("cls", b"1"))}
    write_tar(tmp_path / "only.tar", members)
    data = settings(tmp_path, train=f"{tmp_path}/only.tar", global_batch=16)
    one, eight = keys(data, 0, 5), keys(data, 0, 5, 8)
    assert one == eight and len({key for batch in one[:2] for key in batch}) == 32


def test_a_stream_resumes_at_any_batch_on_any_number_of_ranks(digits, reference, monkeypatch):
    """4 ranks stop, 2 go on and stop, 8 go on to the epoch's end and beyond; nothing is decoded twice and no header is read."""
    decoded, scans = [], []
    decode = Decoder.__call__

    def counting(self, item):
        decoded.append(item.origin.key)
        return decode(self, item)

    monkeypatch.setattr(Decoder, "__call__", counting)
    monkeypatch.setattr(offsets, "boundaries", lambda *_: scans.append(1))
    data = settings(digits)
    for first in (0, 1, 12, 23, 29, 30):
        second = min(first + 1 + first % 7, 31)
        seen = keys(data, 0, first, 4) + keys(data, first, second - first, 2) + keys(data, second, 32 - second, 8)
        assert seen == reference[None][:32], first
        assert sorted(decoded) == sorted(key for batch in seen for key in batch)
        decoded.clear()
    assert not scans


def test_shards_with_an_index_are_opened_when_a_sample_is_wanted(digits, monkeypatch):
    found = Shards(f"{digits}/train-*.tar", "data.train", 10)
    found.close()
    opened, original = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *more, **named: opened.append(str(path)) or original(path, *more, **named))
    assert [found[index].label < 10 for index in (700, 701, 3)] == [True] * 3
    assert len([path for path in opened if path.endswith(".tar")]) == 2


def chi_square(batches: list[np.ndarray], classes: int) -> float:
    """Standard score of the chi-square statistic of the classes in all batches against equal shares; 0 +- 1 for uniform draws."""
    counts = np.array([np.bincount(batch, minlength=classes) for batch in batches])
    expected = counts.sum(axis=1, keepdims=True) / classes
    freedom = len(batches) * (classes - 1)
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def drawn(counts: np.ndarray, labels: np.ndarray, together: int | None, epoch: int, batch: int = 100) -> list[np.ndarray]:
    data = Data(train="-", val="-", image_size=8, global_batch=batch, shuffle_shards=together)
    held = SimpleNamespace(counts=counts, samples=int(counts.sum()), shard_of=None)
    order = GlobalOrder(held, data, 0, True).epoch(epoch)
    return [labels[order[first : first + batch]] for first in range(0, len(order) - batch + 1, batch)]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Shards of 41, 5 and 2 images of three classes, and one whose label is none."""
    folder = tmp_path_factory.mktemp("uneven")
    labels = [b"0"] * 41 + [b"1"] * 5 + [b"x"] + [b"2"] * 2
    for shard in range(2):
        members = {f"{i:02}.{kind}": c for i in range(shard, 49, 2) for kind, c in (("png", png(i)), ("cls", labels[i]))}
        write_tar(folder / f"train-{shard}.tar", members)
    index.make(index.find([str(folder)]), None, None, 1)
    return folder


@pytest.mark.parametrize("sampling, wanted", [("balanced", [16, 17, 16]), ([1, 0, 3], [12, 0, 37])])
def test_classes_have_their_share_of_each_epoch(uneven, sampling, wanted):
    """Within a class each image as often as any other or once more; on any number of ranks and workers."""
    data = settings(uneven, val="-", global_batch=8, sampling=sampling)
    found = Shards(data.train, "data.train", 3, data)
    one = GlobalOrder(found, data, 0, True)
    for epoch in range(3):
        chosen = one.epoch(epoch)
        assert np.bincount(found.labels[chosen], minlength=3).tolist() == wanted
        for label in range(3):
            often = np.bincount(chosen, minlength=49)[found.labels == label]
            assert often.max() - often.min() <= 1
    assert not np.array_equal(one.epoch(0), one.epoch(1)) and (found.labels == -1).sum() == 1
    assert any("1 samples of 'data.train' without a good label are not drawn" in note for note in found.notes)
    batches = [keys(data.model_copy(update={"workers": n}), 3, 5, ranks) for n, ranks in ((0, 1), (2, 2), (1, 4))]
    assert batches[0] == batches[1] == batches[2]


def test_shards_that_no_epoch_has_samples_of_are_not_waited_for(tmp_path):
    """Of four shards, sorted by class, with classes that are never drawn, or too seldom for a single sample."""
    for shard in range(4):
        label = f"{shard}".encode()
        write_tar(tmp_path / f"train-{shard}.tar", {f"{n}.{k}": c for n in range(8) for k, c in (("png", png(n)), ("cls", label))})
    index.make(index.find([str(tmp_path)]), None, None, 1)
    data = settings(tmp_path, val="-", global_batch=8, sampling=[0, 1, 1, 1e-6])
    found = Shards(data.train, "data.train", 4, data)
    # As if they were elsewhere.
    found.remote = {number: (f"https://host/{number}.tar", 1, None) for number in range(4)}
    needs = list(downloads._needs(found, GlobalOrder(found, data, 0, True), True, 0))
    assert {need[1] for need in needs} == {"https://host/1.tar", "https://host/2.tar"}


def test_a_batch_has_each_image_several_times_with_other_changes(digits):
    """As many epochs as there are repeats share one without."""
    augmentation = {"kind": "pad_crop", "padding": 3, "flip": True}
    data = settings(digits, augmentation={**augmentation, "repeats": 3})
    found = Shards(data.train, "data.train", 10)
    orders = [GlobalOrder(found, data, 0, True).epoch(epoch) for epoch in range(6)]
    for order in orders:
        assert all(np.array_equal(batch, np.tile(batch[:16], 3)) for batch in order.reshape(-1, 48))
    for first in (0, 3):
        assert np.bincount(np.concatenate(orders[first : first + 3]), minlength=1442).tolist().count(3) == 1440
    batches = Stream(found, data, 0, True).batches()
    batch = next(batches)
    batches.close()
    assert batch.keys[:16] == batch.keys[16:32] == batch.keys[32:] and len(set(batch.keys)) == 16
    first, *others = (batch.images[n : n + 16].float() * (1 - 2 * batch.flips[n : n + 16].view(-1, 1, 1, 1)) for n in (0, 16, 32))
    assert all((first != other).flatten(1).any(1).sum() > 12 for other in others)
    assert len(set(map(tuple, batch.flips.view(3, 16).int().tolist()))) == 3


def test_orders_by_class_that_cannot_be_are_refused(uneven, digits, tmp_path, train):
    write_tar(tmp_path / "train-0.tar", {"a.png": png(1), "a.cls": b"0"})
    for folder, sampling, message in (
        (tmp_path, "balanced", "index.json has none of train-0.tar; `python -m data_tools.index .*` adds them"),
        (uneven, [1, 2], "2 shares for 3 classes of 'data.train'; give one for each"),
        (uneven, [0, 0, 0, 1], "'data.train' has no labelled image of a class whose share is above 0"),
    ):
        data = settings(folder, val="-", global_batch=1, sampling=sampling)
        with pytest.raises(InputError, match=f"key 'data.sampling': .*{message}"):
            GlobalOrder(Shards(data.train, "data.train", 3, data), data, 0, True)
    refused(train("data.augmentation.repeats=7"), r"'data': 'augmentation\.repeats' \(7\) must divide global_batch")
    refused(train("data.sampling=balanced", "data.shuffle_shards=2"), "remove shuffle_shards, or sampling")
    refused(train("data.sampling=[0,0]"), r"'data\.sampling': expected uniform, balanced, or a share for each class")
    refused(train("data.sampling=often"), r"'data\.sampling': expected uniform, balanced, or a share for each class")


SHARDS, EACH, CLASSES = 100, 500, 20


@pytest.mark.parametrize("epoch", range(3))
def test_shards_sorted_by_class_give_batches_like_a_uniform_shuffle(epoch):
    """100 shards of 500 samples, each of one class: all batches of 100 of an epoch, against a multinomial of equal shares."""
    labels = np.repeat(np.arange(SHARDS) % CLASSES, EACH)
    # Samples are drawn without replacement, which takes a 500th off the variance.
    assert abs(chi_square(drawn(np.full(SHARDS, EACH), labels, None, epoch), CLASSES)) < 4
    # The test can see: with few shards at a time these batches are far from uniform.
    assert chi_square(drawn(np.full(SHARDS, EACH), labels, 8, epoch), CLASSES) > 100


@pytest.mark.parametrize("epoch", range(3))
def test_shards_made_shuffled_give_such_batches_with_few_shards_in_use(epoch):
    """The source was sorted by class, but shuffled once when the shards were made, as data_tools.make_shards does."""
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(CLASSES), SHARDS * EACH // CLASSES))
    assert abs(chi_square(drawn(np.full(SHARDS, EACH), labels, 8, epoch), CLASSES)) < 4


@pytest.mark.parametrize("together", [1, 4, 16])
def test_about_so_many_shards_are_in_use_at_a_time(together):
    counts = np.random.default_rng(0).integers(80, 120, SHARDS)
    shard = np.repeat(np.arange(SHARDS), counts)[order_with_locality(counts, 0, 3, together)]
    first = np.array([np.flatnonzero(shard == s)[0] for s in range(SHARDS)])
    last = np.array([np.flatnonzero(shard == s)[-1] for s in range(SHARDS)])
    in_use = [int(((first <= t) & (last >= t)).sum()) for t in range(len(shard))]
    assert max(in_use) <= together * 1.3 + 3
    assert np.mean(in_use) > together * 0.7


def test_orders_are_fixed_for_good():
    """A run that is resumed by a later release must go on in the same order."""
    assert data_order.order(8, 0, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert order_with_locality(np.array([3, 2, 3]), 0, 0, 2).tolist() == [0, 2, 4, 5, 6, 1, 3, 7]
