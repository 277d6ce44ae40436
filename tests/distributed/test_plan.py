"""What steps send, and what is kept, on two real processes is what dnal_dist.plan says."""

import math
from collections import Counter

import pytest

from dnal_dist import nets
from dnal_dist.distributed import estimate

pytestmark = pytest.mark.timeout(1000)

CASES = ["vgg_digits:2", "supernet_digits:1"]
RANKS, SIZE = 2, 8
LAUNCHES = [(backend, "no", case) for backend in estimate.BACKENDS for case in CASES]
# What is sent in the precision of the weights' copies, which one network shows.
LAUNCHES += [(backend, "bf16", CASES[0]) for backend in ("fsdp2", "zero2", "zero3")]


@pytest.fixture(scope="module")
def found(ranks):
    """Measurements by case, for (backend, precision): each taken once, all cases in one job."""
    done = {}

    def find(backend: str, precision: str) -> dict:
        key = backend, precision
        if key not in done:
            done[key] = ranks.run(backend, RANKS, "traffic_on_ranks:traffic", CASES[: 1 + (precision == "no")], precision=precision)
        return done[key]

    return find


def total(operations) -> int:
    return sum(size for _, size in operations)


@pytest.mark.parametrize(("backend", "precision", "case"), LAUNCHES)
def test_an_architecture_step_sends_one_all_reduce_of_the_gates_and_what_gathers_the_weights(found, backend, precision, case):
    net = nets.build(case.partition(":")[0])
    operations = [tuple(operation) for operation in found(backend, precision)[case]["architecture"]]
    others = [operation for operation in operations if operation[0] != "all-gather"]
    assert others == [("all-reduce", 4 * net.num_gates)]
    if backend in ("ddp", "zero1", "zero2"):
        assert operations == others


@pytest.mark.parametrize(("backend", "precision", "case"), LAUNCHES)
def test_steps_send_what_was_planned(found, backend, precision, case):
    name, _, parts = case.partition(":")
    planned = estimate.traffic(nets.build(name), backend, RANKS, SIZE, precision, int(parts))
    for step, operations in zip(("weight", "architecture"), planned, strict=True):
        measured = [tuple(operation) for operation in found(backend, precision)[case][step]]
        assert {kind for kind, _ in measured} == {kind for kind, _ in operations}
        if backend in ("ddp", "fsdp2"):
            assert Counter(measured) == Counter(operations)
        else:
            # In which pieces it sends is DeepSpeed's affair.
            assert math.isclose(total(measured), total(operations), rel_tol=0.1)


@pytest.mark.parametrize(("backend", "precision", "case"), LAUNCHES)
def test_a_rank_keeps_what_was_planned(found, backend, precision, case):
    name, _, parts = case.partition(":")
    planned = estimate.memory(nets.build(name), backend, RANKS, precision, int(parts))
    for kind, measured in found(backend, precision)[case]["memory"].items():
        assert math.isclose(measured, getattr(planned, kind), rel_tol=0.1), kind
