"""Run by test_two_processes on each process: what is sent, and what is equal afterwards."""

import torch

from dnal_dist import nets
from dnal_dist.common.errors import InputError
from dnal_dist.distributed.context import Parallel


def main() -> None:
    parallel = Parallel()
    assert parallel.world_size == 2 and parallel.backend == "ddp"
    statistics_are_combined(parallel)
    a_difference_is_found(parallel)
    assert parallel.from_main(["main", "other"][parallel.rank]) == "main"
    assert parallel.gather([parallel.rank]) == [0, 1]
    parallel.close()
    print(f"rank {parallel.rank} done", flush=True)
    parallel.leave(0)


def statistics_are_combined(parallel: Parallel) -> None:
    """Of equally many samples on each process, the combined statistics are those of all samples together."""
    norm = nets.GatedBatchNorm(3).double()
    samples = torch.randn(2, 50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + torch.tensor(
        [0.0, 5.0, -9.0]
    )
    mine = samples[parallel.rank]
    norm.running_mean.copy_(mine.mean(0))
    norm.running_var.copy_(mine.var(0, unbiased=False))
    parallel.average_statistics(torch.nn.Sequential(norm))
    torch.testing.assert_close(norm.running_mean, samples.flatten(0, 1).mean(0))
    torch.testing.assert_close(norm.running_var, samples.flatten(0, 1).var(0, unbiased=False))


def a_difference_is_found(parallel: Parallel) -> None:
    value = {"stem": torch.zeros(5), "stages.0": torch.ones(3), "delta": torch.tensor(1.5)}
    parallel.agree("alpha", value)
    value["stages.0"][2] += 1e-7 * parallel.rank
    try:
        parallel.agree("alpha", value)
    except InputError as error:
        assert "alpha of stages.0 on process 1" in str(error), error
    else:
        raise SystemExit("a difference between processes went unseen")


if __name__ == "__main__":
    main()
