"""How long networks take for a batch of images, in several runtimes, taking turns in one process."""

import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist import nets, recipe
from dnal_dist.common.errors import InputError
from dnal_dist.export import files, readers
from dnal_dist.export.program import program
from dnal_dist.nets import compact, cost
from dnal_dist.nets.masks import rescue
from dnal_dist.nets.whole import whole

# The least number of rounds, and the largest difference between runtimes, relative to the largest logit.
ROUNDS, EQUAL = 5, 1e-4


class Row(NamedTuple):
    """One line of the table. Times by network, seconds a batch."""

    batch: int
    threads: int
    runtime: str
    median: dict[str, float]
    spread: dict[str, float]
    """Half of what lies between the first and the third quartile."""
    faster: dict[str, float]
    """How many times faster than the full network: the median over rounds, each with its own time of both."""


def subjects(settings: recipe.Recipe, folder: Path | None) -> dict[str, tuple[nn.Module, int]]:
    """Networks in eval mode as they are deployed, each with its MACs: the full one; of a run folder also its compact one, and one
    that keeps the same part of every site at no more MACs. Raises InputError."""
    size = settings.data.image_size
    torch.manual_seed(0)
    full = nets.build(**settings.network).eval()
    everything = torch.ones(full.num_gates, dtype=torch.bool)
    found = {"full": (whole(compact.compact(full, everything)), cost.count(full, size).macs)}
    if folder is None:
        return found
    try:
        small = compact.load(folder / "compact")
    except ValueError as error:
        raise InputError(str(error)) from None
    even = evenly(full, size, _macs(small, size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rescued channels
        thinned = compact.compact(full, even).eval()
    found["compact"] = (whole(small), _macs(small, size))
    found["even"] = (whole(thinned), cost.count(full, size, even).macs)
    return found


@torch.no_grad()
def _macs(network: nn.Module, size: int) -> int:
    """Multiply-adds of the convolutions and Linear layers for one image."""
    total = 0

    def add(module: nn.Module, _, output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        total += weight[0].numel() * output[0].numel()

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(add) for module in layers]
    network(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return total


def evenly(network: nets.GatedNetwork, size: int, macs: int) -> Tensor:
    """The mask, bool (N,), that keeps the same fraction of every site, as large as `macs` allow."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.count(network, size, _part(network, middle)).macs <= macs else (low, middle)
    return _part(network, low)


def _part(network: nets.GatedNetwork, fraction: float) -> Tensor:
    kept = [torch.arange(channels) < max(1, round(fraction * channels)) for channels in network.gate_sites.values()]
    return rescue(network, torch.cat(kept))[0]


def runner(module: nn.Module, images: Tensor, runtime: str, threads: int, folder: Path) -> Callable[[], Tensor]:
    """A function that runs `module`, on the images' device, on `images` in a runtime, and returns logits (n, classes). Raises
    InputError for a runtime that is not installed."""
    if runtime == "eager":
        return lambda: module(images)
    if runtime == "compile":
        compiled = torch.compile(module, dynamic=False)
        return lambda: compiled(images)
    files.WRITERS[runtime](program(module, images.shape[2]), folder, None)
    run, array = readers.opened(folder, files.NAMES[runtime], threads), images.numpy()
    return lambda: torch.from_numpy(run(array))


def rounds(runs: dict[str, Callable], seconds: float, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run, by turns, for about so long in all.

    Each turn runs twice and times the second: the first finds what another network left in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < ROUNDS:
        for name, run in runs.items():
            run()
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    made: dict[str, tuple[nn.Module, int]],
    image_size: int,
    device: torch.device,
    settings: Sequence[tuple[int, int, str]],
    seconds: float,
) -> Iterator[Row]:
    """A row for each batch, threads and runtime of `settings`. Raises InputError."""
    usual = torch.get_num_threads()
    try:
        for batch, threads, runtime in settings:
            torch.set_num_threads(threads)
            if runtime == "compile":
                # Compact networks share their code, of which only so many forms are compiled; the others would run eagerly.
                torch._dynamo.reset()
            images = torch.randn(batch, 3, image_size, image_size, device=device)
            with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
                runs = {}
                for name, (module, _) in made.items():
                    own = Path(folder, name)
                    own.mkdir()
                    runs[name] = runner(module.to(device), images, runtime, threads, own)
                    require_equal(runs[name](), module(images), f"{name} in {runtime}")
                times = rounds(runs, seconds, device)
            yield _row(batch, threads, runtime, times)
    finally:
        torch.set_num_threads(usual)


def _row(batch: int, threads: int, runtime: str, times: dict[str, list[float]]) -> Row:
    quartiles = {name: statistics.quantiles(row, n=4) for name, row in times.items()}
    faster = {
        name: statistics.median(full / own for full, own in zip(times["full"], row, strict=True))
        for name, row in times.items()
        if name != "full"
    }
    median = {name: statistics.median(row) for name, row in times.items()}
    return Row(batch, threads, runtime, median, {name: (q[2] - q[0]) / 2 for name, q in quartiles.items()}, faster)


def require_equal(found: Tensor, expected: Tensor, what: str) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= EQUAL:
        raise InputError(f"{what}: its logits differ by {difference:.1e} of the largest, so it is not timed")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
