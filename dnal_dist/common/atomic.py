"""Files and folders that are whole or not there, whatever ends the process or the machine."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dnal_dist.common.span import span, spanned

# Errors of file systems (CIFS, some of FUSE) that cannot wait until a folder is on disk.
_UNABLE = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
weaker: set[str] = set()
"""What such file systems cannot do, in words, for a warning."""
# Leftovers of a process that was killed have names of these forms, and no other process looks at them.
UNFINISHED, REPLACED, REMOVED = ".{}.unfinished", ".{}.replaced", ".{}.removed"


def replace(path: Path, content: bytes) -> None:
    """Make `content` the file at `path`; until it is on disk, the one that was there stays."""
    unfinished = path.with_name(UNFINISHED.format(path.name))
    write(unfinished, content)
    rename(unfinished, path)


def put(path: Path, content: bytes) -> None:
    """Likewise, but without waiting for the disk: for what can be made again. What was there stays if it cannot be finished."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    try:
        # A new file, never one that somebody has put there, such as a link to elsewhere.
        with draft.open("xb") as file:
            file.write(content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def folder(final: Path) -> Iterator[Path]:
    """A folder to fill inside. It is on disk and called `final` afterwards, in place of what was there; or gone, after an error."""
    unfinished = final.with_name(UNFINISHED.format(final.name))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        to_disk(unfinished)
        _exchange(unfinished, final)
    except OSError:
        # Where the disk is full, what cannot be finished must not keep it so.
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _exchange(unfinished: Path, final: Path) -> None:
    """Give `unfinished` its name. What had that name lasts until then, if need be under another (see clean)."""
    replaced = final.with_name(REPLACED.format(final.name))
    shutil.rmtree(replaced, ignore_errors=True)
    replaces = final.exists()
    if replaces:
        os.rename(final, replaced)
    try:
        rename(unfinished, final)
    except OSError:
        if replaces and not final.exists():
            os.rename(replaced, final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def write(path: Path, content: bytes) -> None:
    """A new file at `path`, on disk when this returns; its folder need not be."""
    with span("write", (path, content)), path.open("wb") as file:
        file.write(content)
    to_disk(path)


@spanned("fsync")
def to_disk(path: Path) -> None:
    """Wait until what was written to the file or folder `path` is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise OSError(error.errno, f"fsync: {error.strerror}", str(path)) from None
        weaker.add(f"its file system cannot wait for its disk (fsync: {error.strerror}); a crash of it may lose the last files")
    finally:
        os.close(handle)


def rename(old: Path, new: Path) -> None:
    with span("rename"):
        os.replace(old, new)
    to_disk(new.parent)


@spanned("removal")
def remove(path: Path) -> None:
    """Remove a folder; a reader finds it whole or not at all."""
    removed = path.with_name(REMOVED.format(path.name))
    shutil.rmtree(removed, ignore_errors=True)
    os.rename(path, removed)
    shutil.rmtree(removed)


def clean(folder: Path) -> None:
    """Remove what processes that were killed left unfinished in `folder`, and give back its name to what was to be replaced."""
    for path in folder.glob(REPLACED.format("*")):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if not final.exists():
            os.rename(path, final)
    for form in (UNFINISHED, REPLACED, REMOVED):
        for path in folder.glob(form.format("*")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
