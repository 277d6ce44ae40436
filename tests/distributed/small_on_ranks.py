"""Jobs of test_ranks and test_accelerate_config: the backend, and faults of single ranks."""

import time

from dnal_dist.distributed.context import Context


def backend(context: Context) -> tuple[str, int]:
    """As rank 0 knows it; its result is that of the job."""
    assert context.gather([context.rank]) == [*range(context.world_size)]
    return context.backend, context.world_size


def fail(context: Context) -> None:
    if context.rank == 1:
        raise ValueError("the error of this test")
    context.gather([context.rank])


def hang(context: Context) -> None:
    time.sleep(3600)
