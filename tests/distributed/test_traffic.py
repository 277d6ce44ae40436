"""What the planner foresees is what two processes send and keep."""

import json
from collections import Counter

import pytest
from launching import launch, succeed

from dnal_dist import nets, plan

pytestmark = pytest.mark.timeout(1000)

CASES = ["vgg_digits:1", "supernet_digits:1", "vgg_digits:2"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder, done = tmp_path_factory.mktemp("traffic"), {}

    def find(backend: str, case: str) -> dict:
        if backend not in done:
            out = folder / f"{backend}.json"
            succeed(launch(backend, 2, "tests/distributed/traffic_on_ranks.py", out, *CASES))
            done[backend] = json.loads(out.read_text())
        return done[backend][case]

    return find


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", plan.BACKENDS)
def test_an_architecture_step_sends_four_bytes_a_gate(measured, backend, case):
    """In one collective; beside it FSDP2 and ZeRO-3 only gather the weights that the forward pass needs."""
    net, found = nets.build(case.partition(":")[0]), measured(backend, case)["architecture"]
    reductions = [operation for operation in found if operation[0] != "all-gather"]
    assert reductions == [["all-reduce", 4 * net.num_gates]]
    if backend in ("ddp", "zero1", "zero2"):
        assert len(found) == 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", plan.BACKENDS)
def test_a_weight_step_sends_what_was_planned_and_no_alpha(measured, backend, case):
    """Also where a step is taken in two parts: gradients are reduced once."""
    net, found = nets.build(case.partition(":")[0]), measured(backend, case)["weight"]
    planned, _ = plan.traffic(net, backend, 2)
    once = ("all-reduce", "reduce-scatter")
    if backend == "ddp":
        # How gradients are divided into buckets is DDP's; all of them are sent once.
        assert {operation for operation, _ in found} == {"all-reduce"}
        assert sum(size for _, size in found) == sum(size for _, size in planned)
    elif case.endswith(":1"):
        assert Counter(map(tuple, found)) == Counter(planned)
    assert sum(size for kind, size in found if kind in once) == sum(size for kind, size in planned if kind in once)


@pytest.mark.parametrize("case", CASES[:2])
@pytest.mark.parametrize("backend", plan.BACKENDS)
def test_memory_is_within_a_tenth_of_the_plan(measured, backend, case):
    planned, found = plan.memory(nets.build(case.partition(":")[0]), backend, 2), measured(backend, case)["memory"]
    for kind in ("parameters", "gradients", "optimizer"):
        assert found[kind] == pytest.approx(getattr(planned, kind), rel=0.1), kind
