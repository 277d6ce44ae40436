"""Time of a run by part, and traces of its steps: two listeners at its spans (common/span.py)."""

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dnal_dist.common.phases import PHASES
from dnal_dist.common.span import attached

# Spans, and the part of the breakdown that their time counts for.
PARTS = {name: name for name in ("forward", "backward", "sync", "optimizer", "logging", "evaluation", "checkpoint")}
PARTS = {"data wait": "data_wait", **PARTS, "gather": "checkpoint"}
OTHER = "other"
# Steps of a phase before a trace begins: the first ones also allocate and compile.
WARM_UP = 2


class Breakdown:
    """Seconds of the main thread in each part, without those of parts nested within it; the rest is in `other`.

    synchronise: wait for the GPU at each boundary. Otherwise a part counts the time in which the host queues its kernels, and the
    waiting is in the part that reads a result: logging, evaluation or checkpoint.
    """

    def __init__(self, synchronise: bool = False):
        self.synchronise, self.thread = synchronise, threading.get_ident()
        self.start()

    def start(self) -> None:
        """Begin again at zero."""
        self.seconds = dict.fromkeys((*PARTS.values(), OTHER), 0.0)
        self.part, self.since = OTHER, time.perf_counter()

    def so_far(self) -> dict[str, float]:
        """Seconds by part since the start; their sum is the wall time since then."""
        self._enter(self.part)
        return {part: round(seconds, 3) for part, seconds in self.seconds.items()}

    def __call__(self, name: str, _: object) -> AbstractContextManager:
        if name not in PARTS or threading.get_ident() != self.thread:
            return contextlib.nullcontext()
        return self._within(PARTS[name])

    @contextlib.contextmanager
    def _within(self, part: str) -> Iterator[None]:
        outer = self._enter(part)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, part: str) -> str:
        """Count for `part` from here on; returns the part before."""
        if self.synchronise and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now, before = time.perf_counter(), self.part
        self.seconds[before] += now - self.since
        self.part, self.since = part, now
        return before


class Tracer:
    """Traces `steps` steps of each phase with torch.profiler, into folder/PHASE-rankN.json.gz (chrome://tracing, Perfetto)."""

    def __init__(self, folder: Path, rank: int, steps: int):
        self.folder, self.rank, self.steps = folder, rank, steps
        self.phase, self.taken, self.profile = "", 0, None

    def __call__(self, name: str, _: object) -> AbstractContextManager:
        if name in PHASES:
            return self._within(name)
        if name == "data wait":
            self._next_step()
        return contextlib.nullcontext() if self.profile is None else record_function(name)

    @contextlib.contextmanager
    def _within(self, phase: str) -> Iterator[None]:
        self.phase, self.taken = phase, 0
        try:
            yield
        finally:
            self._stop()

    def _next_step(self) -> None:
        self.taken += 1
        if self.taken == WARM_UP + 1:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self.profile.start()
        elif self.taken == WARM_UP + 1 + self.steps:
            self._stop()

    def _stop(self) -> None:
        if self.profile is None:
            return
        found, self.profile = self.profile, None
        found.stop()
        self.folder.mkdir(exist_ok=True)
        found.export_chrome_trace(str(self.folder / f"{self.phase}-rank{self.rank}.json.gz"))


@contextlib.contextmanager
def traced(run, steps: int | None) -> Iterator[None]:
    """Trace `steps` steps of each phase of `run` within the context, and measure its breakdown exactly. None: neither."""
    if steps is None:
        yield
        return
    run.breakdown.synchronise = True
    with attached(Tracer(run.folder / "profile", run.context.rank, steps)):
        yield
