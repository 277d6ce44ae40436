"""One trajectory on every backend: pretrain, alternating search, prune, compaction and finetune, in float32."""

import pytest
import torch
from safetensors.torch import load_file

# A job takes all cases of a backend; a busy machine may need minutes for one.
pytestmark = pytest.mark.timeout(1000)

JOB = "trajectory_on_ranks:trajectories"
BACKENDS = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
# With fixed statistics a batch may be divided as one likes. The last network is that of tests/user_networks.py.
EQUAL = [
    "vgg_digits:1:1:fixed:rmsprop",
    "resnet_digits:0:1:fixed:clip:parts:shared",
    "supernet_of_two_cells:2:1:fixed:checkpointing:shared:last",
    "any_network:1:1:batch:sync:checkpointing",
    "any_network:2:1:fixed:parts:shared",
    "vgg_digits:1:1:fixed:adamw",
    "vgg_digits:1:1:fixed:taylor",
]
# All of these compute open channels only.
SKIPPING = ["resnet_digits:1:1:batch:sync:taylor"]
# ZeRO's first two stages differ in how they divide gradients, not in how networks are called: all cases of the second.
FEWER = [EQUAL[0], EQUAL[1], *EQUAL[5:]]
# Two processes have batch statistics of their own.
OWN = "resnet_digits:1:1:batch"
# One process alone divides nothing: statistics of the batch are the harder of the two.
ALONE = ["vgg_digits:2:1:fixed", OWN, "supernet_of_two_cells:0:1:fixed"]
# The reduction of gradients in float32 sums in another order than one process does.
TOLERANCE = 1e-6


def cases_of(backend: str, processes: int) -> list[str]:
    if backend == "single":
        return list(dict.fromkeys(plain(case) for case in [*EQUAL, *SKIPPING, *ALONE]))
    more = SKIPPING if backend in ("ddp", "zero2") else []
    return ALONE if processes == 1 else [*(FEWER if backend == "zero1" else EQUAL), *more, OWN]


def plain(case: str) -> str:
    """The case that it must equal: without what only divides the work otherwise."""
    return ":".join(word for word in case.split(":") if word not in ("parts", "sync", "checkpointing", "shared"))


def by_case(path, cases: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Trajectories as the job wrote them: of each case, by the name of what is compared."""
    found: dict[str, dict[str, torch.Tensor]] = {case: {} for case in cases}
    for name, tensor in load_file(path).items():
        case, _, name = name.partition("/")
        found[case][name] = tensor
    return found


@pytest.fixture(scope="module")
def found(ranks, once):
    """Trajectories by (backend, processes), each computed once: all cases in one job."""
    done = {}

    def find(backend: str, processes: int) -> dict:
        key = backend, processes
        if key not in done:
            cases = cases_of(backend, processes)
            name = f"trajectories-{backend}-{processes}"
            done[key] = by_case(once(name, lambda out: ranks.run(*key, JOB, out, cases, timeout=900)), cases)
        return done[key]

    return find


def compare(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], tolerance: float = TOLERANCE) -> float:
    """Losses, and of each phase all weights and all momentum: relative to their norm. One tensor may be off by as much as a tenth
    of all of its kind allows, since some have no gradient but rounding (a bias before BatchNorm). Returns the largest difference,
    in units of what is allowed."""
    assert ours.keys() <= reference.keys() and len(ours) > 50
    kinds: dict[str, list[str]] = {}
    largest = 0.0
    for name in ours:
        phase, _, rest = name.partition(".")
        kinds.setdefault(name if rest in ("", "cross_entropy") else f"{phase}.{rest.partition('.')[0]}", []).append(name)
    assert {"alpha", "00.cross_entropy", "search.momentum", "finetune.weights"} <= kinds.keys()
    if "keep" in ours:
        assert torch.equal(ours["keep"], reference["keep"]) and 0 < ours["keep"].mean() < 1
    for kind, names in kinds.items():
        whole = torch.cat([reference[name].double().flatten() for name in names]).norm()
        for name in names:
            off = (ours[name].double() - reference[name].double()).norm()
            allowed = tolerance * (reference[name].double().norm() + 0.1 * whole)
            assert off <= allowed, f"{name}, of all {kind}: off by {off:.1e}, allowed {allowed:.1e}"
            largest = max(largest, float(off / allowed)) if allowed else largest
    return largest


@pytest.mark.parametrize("case", ALONE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_process_equals_the_plain_one(found, backend, case):
    compare(found(backend, 1)[case], found("single", 1)[plain(case)])


@pytest.mark.parametrize(("backend", "case"), [(b, case) for b in BACKENDS for case in cases_of(b, 2) if case != OWN])
def test_two_processes_equal_one_on_the_concatenated_batch(found, backend, case):
    compare(found(backend, 2)[case], found("single", 1)[plain(case)])


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_two_processes_with_batch_statistics_of_their_own_equal_ddp(found, backend):
    compare(found(backend, 2)[OWN], found("ddp", 2)[OWN])


@pytest.mark.xdist_group("ddp")
def test_in_double_precision_only_the_last_digits_differ(ranks, tmp_path):
    """What float32 leaves open: BatchNorm over all processes, in micro-batches and recomputed."""
    cases = ["resnet_digits:2:1:batch:double"]
    divided = [f"{case}:sync:checkpointing" for case in cases]
    ranks.run("single", 1, JOB, tmp_path / "one", cases)
    ranks.run("ddp", 2, JOB, tmp_path / "two", divided)
    one, two = by_case(tmp_path / "one", cases), by_case(tmp_path / "two", divided)
    for case, other in zip(cases, divided, strict=True):
        for name, tensor in two[other].items():
            torch.testing.assert_close(tensor, one[case][name], rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
