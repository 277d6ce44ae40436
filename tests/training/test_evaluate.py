"""Evaluation is over exactly the validation set, and says so if it is not."""

import pytest
import torch
from torch import nn

from dnal_dist.common.errors import InputError
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.shards import Shards
from dnal_dist.distributed.context import Context
from dnal_dist.recipe import Data
from dnal_dist.training.evaluate import evaluate


class Sums:
    """In place of Context: `others` is what the other processes have summed up."""

    device, memory_format = torch.device("cpu"), torch.contiguous_format

    def __init__(self, others=0.0):
        self.others, self.own = others, None

    def sum_(self, sums):
        self.own = sums.clone()
        return sums + self.others

    def gather(self, items):
        return items


@pytest.fixture
def data(digits) -> Data:
    return Data(train="-", val=f"{digits}/val-*.tar", image_size=8, global_batch=48, workers=0)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


def stream(data: Data, rank: int = 0, world_size: int = 1) -> Stream:
    return Stream(Shards(data.val, "data.val", 10), data, 0, False, rank, world_size)


def test_a_rare_class_counts_as_much_as_any(data):
    """A network that always answers 3 is right for one class of ten, however many samples that class has."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    nn.init.zeros_(network[1].weight)
    with torch.no_grad():
        network[1].bias.copy_(torch.arange(10) == 3)
    found = evaluate(network, stream(data), data, Context())
    seen = [number for _, number in found.per_class]
    assert found.per_class == [[number if label == 3 else 0, number] for label, number in enumerate(seen)]
    assert sum(seen) == found.samples == 355
    assert (found.accuracy, found.balanced_accuracy) == (seen[3] / 355, pytest.approx(0.1))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_any_number_of_processes_comes_to_the_same(data, network, world_size):
    whole = evaluate(network, stream(data), data, Context())
    assert whole.samples == 355
    parts = []
    for rank in range(world_size):
        sums = Sums()
        with pytest.raises(InputError, match="a process saw other shards"):
            evaluate(network, stream(data, rank, world_size), data, sums)
        parts.append(sums.own)
    together = evaluate(network, stream(data, 0, world_size), data, Sums(sum(parts[1:])))
    assert together._replace(cross_entropy=0) == whole._replace(cross_entropy=0)
    assert together.cross_entropy == pytest.approx(whole.cross_entropy, rel=1e-6)


def test_a_sample_that_is_missing_or_twice_is_an_error(data, network):
    for wrong in (354, 356):
        one = stream(data)
        one.samples = wrong
        with pytest.raises(InputError, match=rf"evaluated 355 samples and skipped 0 of {wrong}"):
            evaluate(network, one, data, Sums())
