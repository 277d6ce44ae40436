"""The loader processes of a stream: how many, how they begin and end, and how a fault in one reaches the run as one line."""

import atexit
import errno
import multiprocessing
import multiprocessing.queues
import multiprocessing.util
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator

import torch
import webdataset

from dnal_dist.common.cores import cores
from dnal_dist.common.errors import InputError

# File descriptors of Python, torch and the trackers, and of each loader: pipes, and tensors of prefetched batches, of both splits.
OTHERS, EACH = 128, 40
# Bytes of a folder's path in which multiprocessing can name its sockets; a socket's whole name takes 107.
LONGEST_FOLDER = 64


def settled(wanted: int) -> tuple[int, str]:
    """How many loader processes this machine has cores and open files for, up to `wanted`; and a line if files are short. More
    loaders than cores only wait for each other, and torch warns of each start."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if files == resource.RLIM_INFINITY else max(0, files - OTHERS) // EACH
    note = f"key 'data.workers': {most} of {wanted} loaders, since a process may open {files} files at a time; raise ulimit -n"
    return min(wanted, cores(), most), note if most < min(wanted, cores()) else ""


def loader_of(pipeline: webdataset.DataPipeline, workers: int, seed: int, pin: bool) -> webdataset.WebLoader:
    """What takes the batches of `pipeline` from so many processes in turn. It raises InputError for what goes wrong in one."""
    if workers and len(os.fsencode(tempfile.gettempdir())) > LONGEST_FOLDER:
        own = tempfile.mkdtemp(prefix="dnal_dist-", dir=socket_folder())
        use_for_sockets(own)
    return webdataset.WebLoader(
        pipeline.compose(_error_as_value),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=_begin_loader,
        # Torch's own generator is for networks: a resumed run starts its loaders again, and must not draw from it for that.
        generator=torch.Generator().manual_seed(seed),
    ).compose(_error_raised)


def socket_folder() -> str:
    """The folder for temporary files, or another where its path is too long for the names of sockets. Raises InputError."""
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(folder)) <= LONGEST_FOLDER and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise InputError(
        f"TMPDIR={tempfile.gettempdir()}: its path has more than {LONGEST_FOLDER} bytes, too many for the sockets of loader "
        f"processes; set TMPDIR to a shorter one, or key 'data.workers' to 0"
    )


def use_for_sockets(folder: str) -> None:
    """Have multiprocessing put its sockets into `folder` instead of one that it makes; removed when this process ends."""
    multiprocessing.current_process()._config["tempdir"] = folder
    # At the same point of its exit as its own, after the sockets.
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-100)


def shared(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in shared memory, through which all goes that leaves a loader process: there at once, it need not be copied."""
    try:
        return tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        raise InputError(_short_of(error)) from None


def _short_of(error: Exception) -> str:
    """What a loader process lacks, and the remedy."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in text:
        return f"key 'data.workers': a loader process may open no more files ({text}); raise ulimit -n, or lower it"
    if "No space left" in text:
        return "key 'data.workers': shared memory is full; enlarge /dev/shm (container: --shm-size, --ipc=host), or lower it"
    return f"key 'data.workers': a loader process cannot hand over a batch ({text}); lower it"


def _error_as_value(batches: Iterable) -> Iterator:
    """An exception would come from a loader process as a page of traceback."""
    try:
        yield from batches
    except InputError as error:
        yield error


def _error_raised(batches: Iterable) -> Iterator:
    try:
        for batch in batches:
            if isinstance(batch, InputError):
                raise InputError(str(batch), local=True)
            yield batch
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) == errno.EMFILE or any(one in str(error) for one in ("Too many open files", "ancdata")):
            raise InputError(_short_of(OSError(errno.EMFILE, "Too many open files")), local=True) from None
        raise


def _as_it_is(batch):
    return batch


def _begin_loader(_worker: int) -> None:
    torch.set_num_threads(1)
    # A terminal or a job may send them to all processes; the process that a loader works for decides when it ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Otherwise a batch that cannot be handed over is dropped, and waited for without end.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_of_loader)


def _end_of_loader(error: Exception, _batch: object) -> None:
    print(f"warning: {_short_of(error)}", file=sys.stderr, flush=True)
    os._exit(1)


@atexit.register
def _end_loaders() -> None:
    """Python would ask them to end by SIGTERM and wait for that, and torch raise an error for each, wherever this process is."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
