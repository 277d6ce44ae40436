"""Every test here is marked `gpu`, and skipped where there is no GPU. What computes on one are processes of their own."""

from pathlib import Path

import gpus
import pytest
from ranks import Ranks

HERE = Path(__file__).parent
NUMBER, WHY_NONE = gpus.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if not NUMBER:
                item.add_marker(pytest.mark.skip(reason=WHY_NONE))
            elif gpus.DEVICE == "cpu" and item.get_closest_marker("cuda_only"):
                item.add_marker(pytest.mark.skip(reason="there is nothing of it on a CPU"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Each outcome is on disk at once, with its traceback: pytest's own summary comes only when all tests are over."""
    # With several workers, the one that ran the test.
    if (report.when == "call" or report.failed) and not hasattr(report, "node"):
        why = {"why": str(report.longrepr)[-6000:]} if report.failed else {}
        gpus.record(report.nodeid, outcome=report.outcome, seconds=round(report.duration, 1), **why)


@pytest.fixture(scope="session")
def gpu_ranks():
    """Pools of processes, one a GPU (see tests/ranks.py)."""
    found = Ranks(gpus.environment)
    yield found
    found.close()


@pytest.fixture
def on_gpu(gpu_ranks, request):
    """on_gpu(job, *arguments): the result of a job in a process with a GPU, or of each of several by `processes`."""

    def run(job: str, *arguments, backend: str = "single", processes: int = 1, **options):
        kind = "ddp" if backend == "single" else backend
        result = gpu_ranks.run(kind, processes, job, *arguments, **{"timeout": 240} | options)
        gpus.record(request.node.name, found=result)
        return result

    return run
