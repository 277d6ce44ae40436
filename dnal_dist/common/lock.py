"""The lock of a run folder: held by the run that trains there, and looked at from outside. No torch."""

import errno
import os
import time
from pathlib import Path

import psutil

# Errors of file systems without locks: ENOTSUPP, which Linux has no name for in Python, is one of some network file systems.
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, 524)

# Where a lock that is held on another machine may not be seen on this one.
_SHARED = (
    "nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "9p", "afs", "panfs", "pvfs", "orangefs", "ocfs", "gfs", "fuse",
)  # fmt: skip


class Lock:
    """The lock of the file `path`, held from here on until `release`, or the process and its children have ended.

    Raises TimeoutError if another process holds it for `seconds`, and OSError if it cannot be taken (see WITHOUT_LOCKS).
    """

    def __init__(self, path: Path, seconds: float):
        import fcntl

        self.handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        until = time.monotonic() + seconds
        while True:
            try:
                return fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    os.close(self.handle)
                    raise
            if time.monotonic() > until:
                os.close(self.handle)
                raise TimeoutError
            time.sleep(0.05)

    def release(self) -> None:
        """Also where the children of this process hold it still. A second call does nothing."""
        import fcntl

        handle, self.handle = self.handle, -1
        if handle >= 0:
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def occupied(folder: Path) -> bool | None:
    """True if a process holds the lock of the run folder, False if none does, None if that cannot be known from here.

    It is looked at by a shared lock that is let go at once, so a run that begins at this moment waits for one more turn of its own
    loop at most. Nothing is created.
    """
    try:
        import fcntl

        handle = os.open(folder / ".lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except (OSError, ImportError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in (errno.EAGAIN, errno.EACCES) else None
    finally:
        os.close(handle)
    return None if is_shared(folder) else False


def is_shared(folder: Path) -> bool:
    """Whether other machines may see `folder` too, as far as the kind of its file system tells."""
    return file_system(folder).startswith(_SHARED)


def file_system(folder: Path) -> str:
    """The kind of the file system that `folder` is on: ext4, nfs4, ...; empty where that is not told."""
    # The last of those with one name lies on top.
    kinds = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    place = Path(os.path.realpath(folder))
    return next((kinds[above] for above in (place, *place.parents) if above in kinds), "")
