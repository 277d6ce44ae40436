"""How long networks take for a batch of images, in several runtimes, taking turns in one process."""

import contextlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dnal_dist.common.cores import cores
from dnal_dist.common.errors import InputError, reason
from dnal_dist.export import files, readers
from dnal_dist.export.compared import Compared
from dnal_dist.export.program import program
from dnal_dist.report.record import Latency

# The least number of rounds, and the largest difference between runtimes, relative to the largest logit.
ROUNDS, EQUAL = 5, 1e-4


def runner(module: nn.Module, images: Tensor, runtime: str, threads: int, folder: Path) -> Callable[[], Tensor]:
    """A function that runs `module`, on the images' device, on `images` in a runtime, and returns logits (n, classes). folder: for
    files. Raises InputError for a runtime that is not installed."""
    if runtime == "eager":
        return lambda: module(images)
    if runtime == "compile":
        compiled = torch.compile(module, dynamic=False)
        return lambda: compiled(images)
    files.WRITERS[runtime](program(module, images.shape[2]), folder, None)
    return reader(folder, images, runtime, threads)


def reader(folder: Path, images: Tensor, runtime: str, threads: int) -> Callable[[], Tensor]:
    """Likewise, by the runtime's file in `folder`."""
    file, array = readers.FILES[runtime], images.numpy()
    if not (folder / file).is_file():
        raise InputError(f"{folder}: there is no {file}; export it by --to {runtime}, or leave out --runtime {runtime}")
    try:
        run = readers.opened(folder, file, threads)
    except ImportError as error:
        raise InputError(f"--runtime {runtime}: {error.name} is not installed") from None
    except Exception as error:  # of many kinds: each runtime has its own
        raise InputError(f"{folder / file}: cannot be loaded ({reason(error)}); export it again") from None
    return lambda: torch.from_numpy(run(array))


def rounds(
    runs: dict[str, Callable], seconds: float, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run, by turns, for about so long in all. clock: what times them.

    Each turn runs twice and times the second: the first finds what another network left in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < ROUNDS:
        for name, run in runs.items():
            run()
            wait(device)
            start = clock()
            run()
            wait(device)
            times[name].append(clock() - start)
    return times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    made: dict[str, Compared], image_size: int, device: torch.device, settings: Sequence[tuple[int, int, str]], seconds: float
) -> Iterator[Latency]:
    """A row for each batch, threads and runtime of `settings`, in about so many seconds each. Raises InputError."""
    usual = torch.get_num_threads()
    try:
        for batch, threads, runtime in settings:
            torch.set_num_threads(threads)
            if runtime == "compile":
                # Compact networks share their code, of which only so many forms are compiled; the others would run eagerly.
                torch._dynamo.reset()
            images = torch.randn(batch, 3, image_size, image_size, device=device)
            with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
                runs = {name: _run(one, images, runtime, threads, Path(folder, name)) for name, one in made.items()}
                times = rounds(runs, seconds, device)
            yield _row(batch, threads, runtime, times)
    finally:
        torch.set_num_threads(usual)


def _run(network: Compared, images: Tensor, runtime: str, threads: int, folder: Path) -> Callable[[], Tensor]:
    """Of a file that is written for this, once its logits are those of the network; an export's files are proven."""
    if network.files is not None and runtime not in ("eager", "compile"):
        return reader(network.files, images, runtime, threads)
    folder.mkdir()
    module = network.module.to(images.device)
    run = runner(module, images, runtime, threads, folder)
    require_equal(run(), module(images), f"{folder.name} in {runtime}")
    return run


def _row(batch: int, threads: int, runtime: str, times: dict[str, list[float]]) -> Latency:
    quartiles = {name: statistics.quantiles(row, n=4) for name, row in times.items()}
    ratios = {
        name: [full / own for full, own in zip(times["full"], row, strict=True)]
        for name, row in times.items()
        if name != "full" and "full" in times
    }
    slower = [name for name, row in ratios.items() if statistics.quantiles(row, n=4)[2] < 1]
    median, faster = ({name: statistics.median(row) for name, row in rows.items()} for rows in (times, ratios))
    spread = {name: (q[2] - q[0]) / 2 for name, q in quartiles.items()}
    return Latency(batch=batch, threads=threads, runtime=runtime, median=median, spread=spread, faster=faster, slower=slower)


def warning(row: Latency) -> str | None:
    """A warning about a compact network that is slower than the full one."""
    if "compact" not in row["slower"]:
        return None
    return (
        f"the compact network is slower than the full one at batch {row['batch']} in {row['runtime']}; architecture.round_to=8 and "
        "architecture.streams=tied give shapes that runtimes are fast with"
    )


def require_equal(found: Tensor, expected: Tensor, what: str) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= EQUAL:
        raise InputError(f"{what}: its logits differ by {difference:.1e} of the largest, so it is not timed")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {cores()} cores"
