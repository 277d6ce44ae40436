"""The trajectory of tests/distributed on a GPU, on every backend over NCCL, equals that of one process on the CPU."""

import math

import gpus
import pytest

pytestmark = pytest.mark.timeout(300)

JOB = "trajectory_on_ranks:trajectories"
BACKENDS = ["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
# In float32 with TF32 off, relative to the norm of all weights or momentum of a phase.
TOLERANCE = 1e-4
TWO_GPUS = pytest.mark.skipif(gpus.count()[0] < 2, reason="needs two GPUs")
PLAIN = ["vgg_digits:1:1:batch", "vgg_digits:1:1:fixed:taylor", "resnet_digits:1:1:batch:apart", "supernet_digits:2:1:fixed"]
MORE = [
    "vgg_digits:2:1:fixed:clip:parts:shared",
    "resnet_digits:1:1:batch:apart:checkpointing:last",
    "supernet_digits:2:1:fixed:checkpointing:last:shared",
]
# Without CUDA graphs, in which the steps of one process run otherwise.
EAGER = [f"{case}:eager" for case in PLAIN]
# The supernet's batch statistics multiply what float32 rounds away by a thousand.
DOUBLE = ["supernet_digits:1:1:batch:double", "vgg_digits:1:1:batch:double:checkpointing", "resnet_digits:1:1:batch:double"]
# Each process has batch statistics of its own, unless they are synchronised.
DIVIDED = ["vgg_digits:1:1:fixed", "resnet_digits:1:1:fixed:clip:parts:shared", "supernet_digits:2:1:fixed:last"]
SYNCED = ["resnet_digits:1:1:batch:sync", "resnet_digits:1:1:batch:sync:checkpointing:last"]
LOW = ["vgg_digits:1:1:batch", "resnet_digits:1:1:fixed:checkpointing:last"]


def plain(case: str) -> str:
    """The case that it must equal: without what only computes it otherwise."""
    left_out = ("parts", "sync", "checkpointing", "compile", "eager", "last", "shared")
    return ":".join(word for word in case.split(":") if word not in left_out)


def cases_of(backend: str, processes: int) -> list[str]:
    if processes > 1:
        return DIVIDED + SYNCED
    return PLAIN + MORE + (DOUBLE if backend in ("single", "ddp") else []) + (EAGER if backend == "single" else [])


ALL = [
    pytest.param(backend, processes, case, marks=[TWO_GPUS] * (processes > 1))
    for backend in BACKENDS
    for processes in ([1] if backend == "single" else [1, 2])
    for case in cases_of(backend, processes)
]


@pytest.fixture(scope="session")
def reference(ranks, once):
    """reference(): trajectories of one process on the CPU, by case. Called late, while another worker may be computing them."""
    from test_backends import by_case

    cases, done = list(dict.fromkeys(plain(case) for case in [*PLAIN, *MORE, *DOUBLE, *DIVIDED, *SYNCED, *LOW])), []

    def of_all() -> dict:
        if not done:
            done.append(by_case(once("gpu-reference", lambda out: ranks.run("single", 1, JOB, out, cases)), cases))
        return done[0]

    return of_all


@pytest.fixture(scope="module")
def found(gpu_ranks, tmp_path_factory):
    """found(backend, processes, precision): trajectories on the GPU and tracebacks of those that failed, by case, computed once."""
    from test_backends import by_case

    done = {}

    def find(backend: str, processes: int = 1, precision: str = "no", cases=None) -> tuple[dict, dict]:
        key = backend, processes, precision
        if key not in done:
            cases = cases or cases_of(backend, processes)
            out = tmp_path_factory.mktemp("trajectories") / "found"
            kind = "ddp" if backend == "single" else backend
            failed = gpu_ranks.run(kind, processes, JOB, out, cases, backend, precision=precision, timeout=280)
            done[key] = by_case(out, cases), failed
        return done[key]

    return find


def test_the_reference_has_all_cases(reference):
    """First, so that no test of a backend pays for it."""
    assert len(reference()) >= 8


@pytest.mark.parametrize("backend, processes, case", ALL)
def test_trajectory_equals_the_cpu(reference, found, backend, processes, case, request):
    from test_backends import compare

    trajectories, failed = found(backend, processes)
    assert case not in failed, failed[case]
    ours = trajectories[case]
    left = {name: tensor for name, tensor in ours.items() if name.endswith("left in memory")}
    ours = {name: tensor for name, tensor in ours.items() if name not in left}
    kept = {name: tensor.shape for name, tensor in ours.items() if name.startswith("finetune.weights")}
    exact = reference()[plain(case)]
    assert {name: exact[name].shape for name in kept} == kept, "another architecture was found"
    largest = compare(ours, exact, TOLERANCE)
    gpus.record(request.node.name, largest_difference=largest * TOLERANCE, left_in_memory=sum(map(float, left.values())))


@pytest.mark.cuda_only
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrap_leaves_nothing_in_memory(found, backend):
    trajectories, failed = found(backend)
    left = {
        f"{case} {name}": float(tensor)
        for case, ours in trajectories.items()
        for name, tensor in ours.items()
        if name.endswith("left in memory") and case not in failed
    }
    assert left and not any(left.values()), left


@pytest.mark.parametrize("precision, backend", [*(("bf16", backend) for backend in BACKENDS), ("fp16", "single"), ("fp16", "ddp")])
def test_in_low_precision_losses_stay_near_and_the_frozen_group_stays(reference, found, backend, precision, request):
    """The job itself compares the frozen group bit for bit before and after each step."""
    if precision == "fp16" and gpus.DEVICE == "cpu":
        pytest.skip("float16 is for GPUs")
    trajectories, failed = found(backend, 1, precision, LOW)
    assert not failed, next(iter(failed.values()))
    off = {}
    for case in LOW:
        ours, exact = trajectories[case], reference()[plain(case)]
        losses = [name for name in ours if name.endswith("cross_entropy")]
        assert len(losses) == 8
        # Before the finetune, in which the architecture may be another.
        off[case] = max(abs(float(ours[name] / exact[name]) - 1) for name in losses[:6])
        assert all(math.isfinite(float(ours[name])) for name in losses)
        assert bool(ours["alpha"].isfinite().all()) and ours["alpha"].dtype == exact["alpha"].dtype
    gpus.record(request.node.name, losses_off=off)
    assert max(off.values()) < 0.05, off
