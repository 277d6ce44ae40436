"""A pool of ranks: processes that `accelerate launch` starts once and that run one job after the other, all of them together.

A job is a function of a module in tests/distributed or tests/gpu, "module:function", with arguments that JSON can hold. It is
called on every rank with a new Context first; the value that rank 0 returns is the result. An error on any rank ends the pool, and
the test fails with the traceback; the next job starts another pool.

accelerate launch ... tests/ranks.py SOCKET      (each rank, started by Pool)
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import forks
import psutil

HERE = Path(__file__).parent
# Modules of jobs.
sys.path += [str(HERE / "distributed"), str(HERE / "gpu")]
# Ranks of so many launches stay in memory at a time; each takes about 0.5 GB.
POOLS = 3


class RankError(AssertionError):
    """A rank raised an error, ended or hung; the message holds tracebacks and the end of the ranks' output."""


def _line(connection: socket.socket) -> bytes:
    """What is sent up to the end of a line; nothing if the other side is gone."""
    found = b""
    while not found.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:
            return b""
        found += more
    return found


class Pool:
    """The ranks of one launch."""

    def __init__(self, backend: str, processes: int, environment: dict[str, str], timeout: float = 300):
        """environment: of the launch; with that of a forks.Server, its processes are forks."""
        self.folder = tempfile.TemporaryDirectory(prefix="ranks")
        address = str(Path(self.folder.name) / "socket")
        self.log = Path(self.folder.name) / "log.txt"
        self.connections: list[socket.socket] = []
        command = forks.command("-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate/{backend}.yaml")
        command += ["--num_processes", str(processes), *forks.command(HERE / "ranks.py", address)[1:]]
        with socket.socket(socket.AF_UNIX) as listener, self.log.open("w") as log:
            listener.bind(address)
            listener.listen()
            listener.settimeout(0.5)
            environment = {**environment, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
            self.launcher = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=HERE.parent)
            until = time.monotonic() + timeout
            while len(self.connections) < processes:
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    connection.setblocking(True)
                    self.connections.append(connection)
                if self.launcher.poll() is not None or time.monotonic() > until:
                    self.close()
                    raise RankError(f"the ranks of {backend} did not start\n{self.output()}")
        # Sent once all ranks have met.
        greetings = [json.loads(_line(connection)) for connection in self.connections]
        # One process alone has nothing to synchronise.
        expected = "single" if (backend, processes) == ("ddp", 1) else backend
        assert {greeting["backend"] for greeting in greetings} == {expected}
        self.pids = [greeting["pid"] for greeting in greetings]

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-8000:]

    def run(self, function: str, *arguments, precision: str = "no", timeout: float = 300):
        """The result of this job. Raises RankError."""
        job = {"function": function, "arguments": arguments, "precision": precision}
        try:
            for connection in self.connections:
                connection.sendall(json.dumps(job, default=str).encode() + b"\n")
            answers = self._answers(timeout)
        except BaseException:
            self.close()
            raise
        return answers[0]["result"]

    def _answers(self, timeout: float) -> list[dict]:
        """Of all ranks, in their order."""
        answers, errors, waiting = [], [], list(self.connections)
        until = time.monotonic() + timeout
        while waiting and time.monotonic() < until:
            ready, _, _ = select.select(waiting, [], [], 1)
            for connection in ready:
                waiting.remove(connection)
                line = _line(connection)
                answers.append(json.loads(line) if line else {"rank": -1, "error": "a rank has ended"})
                if "error" in answers[-1]:
                    errors.append(f"rank {answers[-1]['rank']}: {answers[-1]['error']}")
                    # The others may have the same error, or wait in a collective for ever.
                    until = min(until, time.monotonic() + 5)
        if waiting:
            # Each prints its stack as it dies of it, and the launcher ends.
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGABRT)
                # Two that print at a time mix their words.
                time.sleep(0.1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.launcher.wait(30)
            errors.append(f"{len(waiting)} of {len(self.connections)} ranks gave no answer within {timeout:g} s")
        if errors:
            raise RankError("\n".join([*errors, self.output()]))
        return sorted(answers, key=lambda answer: answer["rank"])

    def _kill(self) -> None:
        """The launcher's processes, and last itself."""
        with contextlib.suppress(psutil.Error):
            launcher = psutil.Process(self.launcher.pid)
            for process in [*launcher.children(recursive=True), launcher]:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def leave(self) -> None:
        """Let the ranks end, without waiting for their launcher, which takes seconds to see it."""
        for connection in self.connections:
            connection.close()

    def close(self) -> None:
        """End the ranks: each leaves when its connection is closed, or else is killed."""
        self.leave()
        try:
            self.launcher.wait(5)
        except subprocess.TimeoutExpired:
            self._kill()
            self.launcher.wait()


class Ranks:
    """Pools by backend and number of processes, started when first asked for; those used longest ago are closed."""

    def __init__(self, environment: Callable[[], dict[str, str]]):
        """environment: gives that of the launches."""
        self.pools: dict[tuple[str, int], Pool] = {}
        self.left: list[Pool] = []
        self.environment = environment

    def run(self, backend: str, processes: int, function: str, *arguments, **options):
        """The result of a job; `single` runs it in this process."""
        if backend == "single":
            assert processes == 1
            return _call({"function": function, "arguments": json.loads(json.dumps(arguments, default=str))})
        key = backend, processes
        pool = self.pools.pop(key, None)
        while len(self.pools) >= POOLS:
            # Those before have long ended, unless they hang.
            for left in self.left:
                left.close()
            self.left = [self.pools.pop(next(iter(self.pools)))]
            self.left[0].leave()
        pool = pool or Pool(backend, processes, self.environment())
        result = pool.run(function, *arguments, **options)
        self.pools[key] = pool
        return result

    def close(self) -> None:
        pools = [*self.left, *self.pools.values()]
        for end in (Pool.leave, Pool.close):
            for pool in pools:
                end(pool)


def _call(job: dict):
    """The value of a job on this rank."""
    from dnal_dist.distributed.context import Context

    context = Context()
    # The ranks stay connected.
    context.close = lambda: None
    module, _, name = job["function"].partition(":")
    try:
        return getattr(importlib.import_module(module), name)(context, *job["arguments"])
    finally:
        gc.collect()


def main(address: str) -> None:
    faulthandler.enable()
    from dnal_dist.distributed.context import Context

    context = Context()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)

        def answer(**values) -> None:
            connection.sendall(json.dumps({"rank": context.rank, **values}, default=str).encode() + b"\n")

        context.wait()
        answer(backend=context.backend, pid=os.getpid())
        while line := _line(connection):
            job = json.loads(line)
            # As the launcher sets it.
            os.environ["ACCELERATE_MIXED_PRECISION"] = job["precision"]
            try:
                answer(result=_call(job))
            except BaseException:
                answer(error=traceback.format_exc())
            # Each phase collects garbage, and would search through all that the modules hold.
            gc.freeze()
    context.close()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
