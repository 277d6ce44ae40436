"""What tests do with whole runs of the digits: begin one, watch it, and compare the records of two of them."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dnal_dist.chaos import equality
from dnal_dist.common import span

# 22 iterations are an epoch. Every iteration is recorded, so that a test can watch where a run stands.
SMALL = (
    "data.global_batch=16", "tracking.log_every=1", "tracking.tracker=none", "tracking.plots=false",
    "architecture.recalibration_batches=2",
)  # fmt: skip


LONG = (*SMALL, "phases.pretrain.epochs=3", "phases.search.epochs=2", "phases.finetune.epochs=2")


SHORT = (*SMALL, "phases.pretrain.steps=4", "phases.search.steps=4", "phases.finetune.steps=4")


def arguments(digits: Path, run: Path, *changes: str) -> list[str]:
    shards = [f"data.train={digits}/train-000000.tar", f"data.val={digits}/val-000000.tar", f"output={run}"]
    return ["recipes/digits.yaml", *shards, *changes]


def records(run: Path, *kinds: str) -> list[dict]:
    """All records of these kinds (of all kinds, if none are given); every line must be one."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if not kinds or record["kind"] in kinds]


def training_records(run: Path) -> list[dict]:
    """A run's records of its training, without what depends on the clock, and without those of starts and warnings."""
    return [equality.timeless(record) for record in records(run, "train", "eval", "gates", "prune", "phase", "end")]


def tensors(run: Path) -> bytes:
    return (run / "compact" / "weights.safetensors").read_bytes()


def reach(process, run: Path, phase: str, step: int, start: int = 1) -> None:
    """Wait until the command, the run's `start`-th, has taken `step` iterations of `phase`."""
    path = run / "metrics.jsonl"
    for _ in range(20_000):
        lines = path.read_text().splitlines() if path.exists() else []
        starts = [number for number, line in enumerate(lines) if '"kind": "start"' in line]
        # What the process before recorded is there until the run resumes.
        lines = lines[starts[start - 1] :] if len(starts) >= start else []
        # The last line may be only half there.
        if any(f'"phase": "{phase}", "step": {step},' in line for line in lines if '"kind": "train"' in line):
            return
        if process.poll() is not None:
            pytest.fail(f"it ended before {phase} {step}: {process.communicate()}")
        time.sleep(0.005)
    pytest.fail(f"it never came to {phase} {step}")


def family(process) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    return not alive


class Killed(BaseException):
    """Ends a run at once."""


def die():
    raise Killed


@contextlib.contextmanager
def at(name: str, before: Callable[[int, object], None] | None = None, after: Callable[[int, object], None] | None = None):
    """Calls `before` and `after` at the ends of each span `name` of a run, with the span's number, from 0 on, and its detail."""
    numbers = itertools.count()

    @contextlib.contextmanager
    def listener(found: str, detail: object):
        if found != name:
            yield
            return
        number = next(numbers)
        if before is not None:
            before(number, detail)
        yield
        if after is not None:
            after(number, detail)

    with span.attached(listener):
        yield


def killed(number: int, *_):
    """For `at`: the run is killed at the span of this number."""
    return lambda found, _: die() if found == number else None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
