"""A job of test_two_processes: what is sent, and what is equal afterwards."""

import torch

from dnal_dist import nets
from dnal_dist.common.errors import InputError
from dnal_dist.distributed.context import Context


def talk(context: Context) -> None:
    assert context.world_size == 2 and context.backend == "ddp"
    statistics_are_combined(context)
    a_difference_is_found(context)
    assert context.from_main(["main", "other"][context.rank]) == "main"
    assert context.gather([context.rank]) == [0, 1]


def statistics_are_combined(context: Context) -> None:
    """Of equally many samples on each process, the combined statistics are those of all samples together."""
    norm = nets.GatedBatchNorm(3).double()
    samples = torch.randn(2, 50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + torch.tensor(
        [0.0, 5.0, -9.0]
    )
    mine = samples[context.rank]
    norm.running_mean.copy_(mine.mean(0))
    norm.running_var.copy_(mine.var(0, unbiased=False))
    context.average_statistics(torch.nn.Sequential(norm))
    torch.testing.assert_close(norm.running_mean, samples.flatten(0, 1).mean(0))
    torch.testing.assert_close(norm.running_var, samples.flatten(0, 1).var(0, unbiased=False))


def a_difference_is_found(context: Context) -> None:
    value = {"stem": torch.zeros(5), "stages.0": torch.ones(3), "delta": torch.tensor(1.5)}
    context.agree("alpha", value)
    value["stages.0"][2] += 1e-7 * context.rank
    try:
        context.agree("alpha", value)
    except InputError as error:
        assert "alpha of stages.0 on process 1" in str(error), error
    else:
        raise SystemExit("a difference between processes went unseen")
