"""The server of forks.py: imports what a training imports once, and forks for whoever asks.

python tests/fork_server.py SOCKET      started by forks.Server
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
from pathlib import Path

import forks
from filelock import FileLock

# Imported before the first fork.
PRELOADED = (
    "accelerate.commands.launch", "dnal_dist.training.command", "torch.distributed.fsdp",
    "matplotlib.figure", "matplotlib.backends.backend_svg",
)  # fmt: skip
# As soon as a launch asks for them: DDP and torch's optimisers import torch._dynamo, and DeepSpeed's engines all of the compiler.
OF_RANKS = ("torch._dynamo",)
OF_DEEPSPEED = ("deepspeed", "deepspeed.runtime.zero.utils", "torch._inductor.compile_fx")


def serve(address: str) -> list[str]:
    """Fork until nobody has a lease or SIGTERM comes. Returns, in each fork, what it is to execute."""
    # As a context sets it where there is no GPU, before DeepSpeed is imported.
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in PRELOADED:
        importlib.import_module(name)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    callers: dict[int, socket.socket] = {}
    leases: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.unready")
        listener.listen(64)
        os.rename(f"{address}.unready", address)
        while True:
            # Who started it may have died of it before its lease.
            ready, _, _ = select.select([listener, woken, *leases, *callers.values()], [], [], None if leases else 60)
            signals = woken.recv(4096) if woken in ready else b""
            if signals:
                _reap(callers)
            for pid, caller in callers.items():
                # The caller was killed.
                if caller in ready and _is_gone(caller):
                    _kill(pid)
            if listener in ready:
                caller, _ = listener.accept()
                request = _request(caller)
                if request == forks.LEASE:
                    leases.append(caller)
                    _tell(caller, b"y")
                elif request:
                    pid = _fork(request, [woken, wake, caller, *leases, *callers.values()])
                    if not pid:
                        return request[0]
                    callers[pid] = caller
                    _tell(caller, f"{pid}\n".encode())
            for lease in [lease for lease in leases if lease in ready]:
                leases.remove(lease)
                lease.close()
            if not leases or signal.SIGTERM in signals:
                for pid in callers:
                    _kill(pid)
                _end(Path(address).parent)


def _fork(request: tuple, connections: list[socket.socket]) -> int:
    """The fork's process id; in the fork, which closes these connections and becomes what is asked for, 0."""
    _, environment, folder, files = request
    deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED") == "true"
    for name in OF_RANKS * ("LOCAL_RANK" in environment) + OF_DEEPSPEED * deepspeed:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    pid = os.fork()
    if pid:
        for file in files:
            os.close(file)
        return pid
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for one in connections:
        one.close()
    _become(environment, folder, files)
    return 0


def _end(folder: Path) -> None:
    # Not while another one is begun.
    with FileLock(f"{folder}.lock"):
        shutil.rmtree(folder, ignore_errors=True)
        Path(f"{folder}.lock").unlink()
        os._exit(0)


def _is_gone(caller: socket.socket) -> bool:
    try:
        return not caller.recv(1)
    except OSError:
        return True


def _tell(caller: socket.socket, answer: bytes) -> None:
    # One that has died meanwhile is no reason to end for those of all other workers.
    with contextlib.suppress(OSError):
        caller.sendall(answer)


def _request(caller: socket.socket):
    """What a caller asks for: forks.LEASE, or a fork; None if it has died."""
    try:
        head, files, _, _ = socket.recv_fds(caller, 4, 3)
        if len(head) < 4 or head == forks.LEASE:
            return head if head == forks.LEASE else None
        content, size = b"", int.from_bytes(head, "big")
        while len(content) < size:
            if not (more := caller.recv(size - len(content))):
                return None
            content += more
    except OSError:
        return None
    request = json.loads(content)
    return request["words"], request["environment"], request["folder"], files


def _become(environment: dict[str, str], folder: str, files: list[int]) -> None:
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path += [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    if "triton" in sys.modules:
        # Or it complains, at the end of the process, of what was left of it.
        atexit.register(gc.unfreeze)
    if environment.get("PYTHONFAULTHANDLER"):
        import faulthandler

        faulthandler.enable()


def _reap(callers: dict[int, socket.socket]) -> None:
    """Tell the callers of forks that have ended how they did."""
    for pid in list(callers):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            caller = callers.pop(pid)
            with caller, contextlib.suppress(OSError):
                caller.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _kill(pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with contextlib.suppress(psutil.Error):
                process.kill()


if __name__ == "__main__":
    forks.execute(serve(sys.argv[1]))
