"""Processes that start with torch already imported: forks of a server that has imported what a training imports, which takes 4 to 8
seconds of a core in each new process.

A command is started by way of this file: `python tests/forks.py run -m MODULE ...` or `... run SCRIPT ...` hands its arguments,
environment, folder and open files to the server named by $FORKS, passes signals on to the fork, and ends as it ends. So
`accelerate launch ... tests/forks.py run -m dnal_dist.train ...` starts its processes as it does any others. Without $FORKS, the
command runs in this process.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__)
ENVIRONMENT = "FORKS"
# In place of the length of a request.
LEASE = b"keep"
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGABRT)


def command(*words) -> list[str]:
    """The command `python WORDS`, as a fork of the server where $FORKS names one."""
    return [sys.executable, str(HERE), "run", *map(str, words)]


class Server:
    """Started when one of the workers of a pytest run first asks for its environment, for all of them; it ends with the last of
    those that did."""

    def __init__(self):
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"{os.getpid()}")
        self.folder, self.lease = Path(tempfile.gettempdir(), f"forks-{run[:12]}"), None

    def environment(self) -> dict[str, str]:
        """What a process needs beside its own environment to be forked from this server."""
        address = self.folder / "socket"
        if self.lease is None:
            with FileLock(f"{self.folder}.lock"):
                self.folder.mkdir(exist_ok=True)
                self.lease = self._lease(address) or self._started(address)
        return {ENVIRONMENT: str(address)}

    def _lease(self, address: Path) -> socket.socket | None:
        """A connection that keeps the server up; None if there is no server."""
        lease = socket.socket(socket.AF_UNIX)
        try:
            lease.connect(str(address))
            lease.sendall(LEASE)
            if lease.recv(1) == b"y":
                return lease
        except OSError:
            pass
        lease.close()
        return None

    def _started(self, address: Path) -> socket.socket:
        address.unlink(missing_ok=True)
        start = [sys.executable, str(HERE.with_name("fork_server.py")), str(address)]
        # It may outlive the worker that starts it.
        with open(self.folder / "log", "w+") as log:
            files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            process = subprocess.Popen(start, **files, cwd=HERE.parent.parent, start_new_session=True)
            until = time.monotonic() + 300
            while not address.exists():
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"the server of forks did not start: {log.read()[-2000:]}")
                time.sleep(0.05)
        return self._lease(address)

    def start(self, words: list, environment: dict[str, str], folder: Path) -> "Fork":
        """The command `python WORDS`, with this environment alone, begun in `folder`."""
        return Fork(self.environment()[ENVIRONMENT], [str(word) for word in words], environment, folder)

    def close(self) -> None:
        """The server ends once nobody needs it, and with it all forks."""
        if self.lease is not None:
            # A process that this one forked, such as a loader's, may hold the connection too.
            with contextlib.suppress(OSError):
                self.lease.sendall(b"x")
            self.lease.close()


def _ask(server: socket.socket, words: list[str], environment: dict[str, str], folder: str, files: list[int]) -> None:
    """The server answers with the fork's process id, and at its end with its exit code, a line each."""
    request = json.dumps({"words": words, "environment": environment, "folder": folder}).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], files)
    server.sendall(request)


class Fork:
    """As a subprocess.Popen: a fork of the server, in a session of its own, with its output in files."""

    def __init__(self, address: str, words: list[str], environment: dict[str, str], folder: Path):
        self.args, self.returncode = words, None
        self.out, self.err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        self.server = socket.socket(socket.AF_UNIX)
        self.server.connect(address)
        with open(os.devnull) as nothing:
            files = [one.fileno() for one in (nothing, self.out, self.err)]
            _ask(self.server, words, environment, str(folder), files)
        self.answers = self.server.makefile("r")
        self.pid = int(self.answers.readline())

    def poll(self, timeout: float = 0) -> int | None:
        """The exit code, once the process has ended, as subprocess.Popen gives it; waits for it `timeout` seconds."""
        if self.returncode is None and select.select([self.server], [], [], timeout)[0]:
            self.returncode = int(self.answers.readline() or -signal.SIGKILL)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        for file in (self.out, self.err):
            file.seek(0)
        return self.out.read(), self.err.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(words: list[str]) -> None:
    """The command `python WORDS`, in a fork of the server."""
    if not os.environ.get(ENVIRONMENT):
        execute(words)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    with socket.socket(socket.AF_UNIX) as server, server.makefile("r") as answers:
        server.connect(os.environ[ENVIRONMENT])
        _ask(server, words, dict(os.environ), os.getcwd(), [0, 1, 2])
        pid = int(answers.readline())

        def pass_on(number, _) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in PASSED_ON:
            signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        code = int(answers.readline() or -signal.SIGKILL)
    if code < 0:
        # As the fork did.
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def execute(words: list[str]) -> None:
    """`python WORDS`, in this process."""
    if words[0] != "-m":
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
        return
    _, name, *arguments = words
    sys.path[0] = os.getcwd()
    if name in sys.modules:
        sys.argv = [sys.modules[name].__file__, *arguments]
        sys.modules[name].main()
    else:
        sys.argv = [name, *arguments]
        runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run(sys.argv[2:])
