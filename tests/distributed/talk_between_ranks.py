"""Run by test_two_processes on each process: what is sent, and what is equal afterwards."""

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from dnal_dist import nets
from dnal_dist.architecture import Architecture
from dnal_dist.parallel import Parallel
from dnal_dist.steps import architecture_step, weight_step


def main() -> None:
    parallel = Parallel()
    assert parallel.world_size == 2 and parallel.backend == "ddp"
    one_architecture_step_is_one_collective(parallel)
    statistics_are_combined(parallel)
    a_difference_is_found(parallel)
    assert parallel.from_main(["main", "other"][parallel.rank]) == "main"
    assert parallel.gather([parallel.rank]) == [0, 1]
    parallel.close()
    print(f"rank {parallel.rank} done", flush=True)
    parallel.leave(0)


def one_architecture_step_is_one_collective(parallel: Parallel) -> None:
    torch.manual_seed(0)
    net = nets.build("resnet_digits")
    architecture = Architecture(net.num_gates)
    wrapped, weights = parallel.wrap(net, torch.optim.SGD(net.parameters(), 0.1))
    alphas = torch.optim.SGD(architecture.parameters(), 0.1)
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)

    # DDP's own reduction, by way of a function that can be watched.
    wrapped.register_comm_hook(None, default_hooks.allreduce_hook)
    sent: list[tuple[str, int]] = []
    for name in ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "barrier"):
        setattr(dist, name, watched(name, getattr(dist, name), sent))

    def weight():
        weight_step(wrapped, weights, images, labels, 4, parallel.backward, architecture.gates(2.0))

    def alpha():
        architecture_step(net, architecture, alphas, images, labels, 4, 2.0, "sigmoid", 0.01, parallel.average_)

    weight()
    sent.clear()
    alpha()
    assert sent == [("all_reduce", net.num_gates)], sent
    sent.clear()
    weight()
    assert {name for name, _ in sent} == {"all_reduce"}, sent
    assert sum(numbers for _, numbers in sent) == sum(p.numel() for p in net.parameters()), sent


def watched(name: str, collective, sent: list):
    def call(*arguments, **options):
        sent.append((name, arguments[0].numel()))
        return collective(*arguments, **options)

    return call


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
    value = torch.zeros(5)
    parallel.assert_equal(value, "value")
    value[3] += 1e-30 * parallel.rank
    try:
        parallel.assert_equal(value, "alpha")
    except AssertionError as error:
        assert "alpha differs on 1 of 2 processes" in str(error)
    else:
        raise SystemExit("a difference between processes went unseen")


if __name__ == "__main__":
    main()
