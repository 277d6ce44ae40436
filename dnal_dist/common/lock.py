"""Whether a process trains in a run folder, looked at from outside. No torch."""

import errno
import os
from pathlib import Path

# Where a lock that is held on another machine may not be seen on this one.
_SHARED = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb",
    "9p",
    "afs",
    "panfs",
    "pvfs",
    "orangefs",
    "ocfs",
    "gfs",
    "fuse",
)


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
    place, best = os.path.realpath(folder), ("", "")
    try:
        lines = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        _, mounted, kind, *_ = line.split(" ")
        mounted = mounted.replace("\\040", " ")
        inside = mounted == "/" or place == mounted or place.startswith(f"{mounted}/")
        # The last of those with one name lies on top.
        if inside and len(mounted) >= len(best[0]):
            best = mounted, kind
    return best[1]
