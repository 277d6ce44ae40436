"""Tasks on several processes, with a progress bar."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 30

Tick = Callable[[int], None]
"""Called with the number of things, mostly images, finished since the last call."""


class Stopped(Exception):
    """In a worker process: the main process has ended, and the task is to be left as it is."""


def in_order(function: Callable[[Any, Tick], Any], tasks: list, workers: int, title: str, total: int | None) -> list[Any]:
    """The results of `function` for all tasks, in their order; see `as_finished`."""
    return [result for _, result in sorted(as_finished(function, tasks, workers, title, total), key=lambda found: found[0])]


def as_finished(
    function: Callable[[Any, Tick], Any], tasks: list, workers: int, title: str, total: int | None
) -> Iterator[tuple[int, Any]]:
    """Yields a task's number and `function(task, tick)` as soon as it is finished, while up to `workers` processes work.

    `function` and tasks are pickled. With one worker, or one task, everything runs in this process. An exception of a task is
    raised here; then, and after Ctrl-C, the next tick of every other task raises Stopped. title and total, the sum of all ticks if
    it is known: for the progress bar.
    """
    workers = min(workers, len(tasks))
    with _Bar(title, total) as bar:
        if workers > 1:
            yield from _on_processes(function, tasks, workers, bar)
            return
        done = 0

        def tick(more: int) -> None:
            nonlocal done
            done += more
            bar.show(done)

        for number, task in enumerate(tasks):
            yield number, function(task, tick)


def _on_processes(function: Callable, tasks: list, workers: int, bar: "_Bar") -> Iterator[tuple[int, Any]]:
    # Forking a process with threads may hang, and the caller may have threads.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(workers, context, _begin, (counter, stop))
    coming, running = enumerate(tasks), {}
    try:
        while True:
            # Few at a time: a task is copied when it is submitted, and may be large.
            while len(running) < 2 * workers and (found := next(coming, None)) is not None:
                with _interrupts_held():
                    running[pool.submit(_call, function, found[1])] = found[0]
            if not running:
                return
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.show(counter.value)
            for future in finished:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise ValueError(f"{bar.title}: a worker process was killed, most likely because memory ran out; lower --workers") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C reaches this process afterwards, and a process that is started meanwhile never: it would only print a traceback of its
    imports. The main process stops its workers by the event `stop`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(counter, stop) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this the workers of a main process that was killed would wait for it for ever."""
    wait_for_any([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _call(function: Callable, task: Any) -> Any:
    return function(task, _tick)


def _tick(more: int) -> None:
    with _counter.get_lock():
        _counter.value += more
    if _stop.is_set():
        raise Stopped


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "", style="progress.data.speed")


class _Bar:
    """A bar on a terminal; elsewhere, as in the log of a batch job, a line every half minute."""

    def __init__(self, title: str, total: int | None):
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task(title, total=total)
        self.title, self.total, self.lines = title, total, not console.is_terminal
        self.started = self.printed = time.monotonic()

    def __enter__(self) -> "_Bar":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def show(self, done: int) -> None:
        self.progress.update(self.task, completed=done)
        now = time.monotonic()
        if self.lines and done and now - self.printed > SECONDS_BETWEEN_LINES:
            self.printed, rate = now, done / (now - self.started)
            left = f" of {self.total:,}, {(self.total - done) / rate / 60:,.1f} minutes left" if self.total else ""
            print(f"{self.title}: {done:,}{left}, {rate:,.0f}/s", file=sys.stderr)
