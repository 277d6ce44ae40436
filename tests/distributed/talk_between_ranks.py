"""Run by test_two_processes on each process: what is sent, and what is equal afterwards."""

import torch

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


def one_architecture_step_is_one_collective(parallel: Parallel) -> None:
    torch.manual_seed(0)
    net = nets.build("resnet_digits")
    architecture = Architecture(net.num_gates)
    wrapped, weights = parallel.wrap(net, torch.optim.SGD(net.parameters(), 0.1))
    alphas = torch.optim.SGD(architecture.parameters(), 0.1)
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)

    def sent(step) -> list[tuple[str, list[int]]]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            step()
        return [(e.name, e.input_shapes) for e in profile.events() if e.name.startswith("gloo:")]

    def weight():
        weight_step(wrapped, weights, images, labels, 4, parallel.backward, architecture.gates(2.0))

    def alpha():
        architecture_step(net, architecture, alphas, images, labels, 4, 2.0, "sigmoid", 0.01, parallel.average_)

    weight(), weight()
    collectives = sent(alpha)
    assert [name for name, _ in collectives] == ["gloo:all_reduce"], collectives
    assert collectives[0][1] == [[net.num_gates]], collectives
    collectives = sent(weight)
    numbers = sum(torch.Size(shape).numel() for _, shapes in collectives for shape in shapes)
    assert numbers == sum(p.numel() for p in net.parameters()), collectives


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
