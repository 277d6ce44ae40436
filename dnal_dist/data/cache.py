"""Copies of remote shards in a folder of this machine: verified, bounded in size, shared by all its processes."""

import errno
import hashlib
import os
import re
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import filelock

from dnal_dist.common.lock import WITHOUT_LOCKS, Lock
from dnal_dist.common.paths import expanded
from dnal_dist.data import remote
from dnal_dist.data.remote import RemoteError

# The folder may hold other files: they are neither counted nor removed.
_OURS = re.compile(r"[0-9a-f]{40}\.(tar|part)")
_POLL = 0.05  # seconds between two tries for a lock or for room


class _Copy(NamedTuple):
    used: float
    bytes: int
    path: Path


class Cache:
    """Copies of remote shards in `folder`, together at most `limit_bytes`; the least recently used are removed first.

    Any number of processes may share the folder. An unfinished copy counts with its whole size and is never removed. A finished
    copy may be removed while a process has it open; it stays readable there, and its space is freed when it is closed. An instance
    holds no open file and no thread, so it can be pickled and used on both sides of a fork.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = Path(expanded(str(folder), "key 'data.cache': ")), limit_bytes
        self.note = ""
        """What is to be said about the folder's file system."""
        with self._folder_named():
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            try:
                Lock(self.folder / "locks" / "probe", 1.0).release()
            except TimeoutError:  # which another process holds
                pass
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                self.note = (
                    f"{self.folder}: its file system has no locks ({error.strerror}), so files stand for them; after a crash "
                    "of the machine, remove its folder locks"
                )

    def get(self, url: str, size: int, sha256: str) -> Path:
        """The copy of the shard at `url`, of `size` bytes and this digest (64 hexadecimal digits).

        One process downloads it and the others wait. Another process may remove the copy at any time; `open` gives one that stays
        readable. Raises RemoteError if the shard cannot be read, is larger than the cache, or twice has another digest.
        """
        self._ensure(url, size, sha256, wait=True)
        return self._path(url, sha256)

    def open(self, url: str, size: int, sha256: str) -> int:
        """A file descriptor of the copy, for reading, which the caller closes. Raises as `get` does."""
        while True:
            # The copy may be removed in between, to make room.
            with suppress(FileNotFoundError):
                return os.open(self.get(url, size, sha256), os.O_RDONLY | os.O_CLOEXEC)

    def has(self, url: str, size: int, sha256: str) -> Path | None:
        """The copy, if it exists, marked as just used. Never waits."""
        path = self._path(url, sha256)
        try:
            if path.stat().st_size != size:
                return None
        except FileNotFoundError:
            return None
        with suppress(OSError):  # another user's file, or one just removed
            os.utime(path)
        return path

    def try_get(self, url: str, size: int, sha256: str) -> bool:
        """True once the copy exists; False at once if another process is downloading it, or downloads leave no room now.

        Raises as `get` does.
        """
        return self._ensure(url, size, sha256, wait=False)

    def _ensure(self, url: str, size: int, sha256: str, wait: bool) -> bool:
        path = self._path(url, sha256)
        with self._folder_named():
            if self.has(url, size, sha256):
                return True
            try:
                with self._lock(path.stem).acquire(blocking=wait):
                    return bool(self.has(url, size, sha256)) or self._download(url, size, sha256, path, wait)
            except filelock.Timeout:
                return False

    def _path(self, url: str, sha256: str) -> Path:
        # A hash of both, so that nothing from an index or a recipe becomes part of a path.
        return self.folder / f"{hashlib.sha256(f'{sha256.lower()} {url}'.encode()).hexdigest()[:40]}.tar"

    def _lock(self, name: str) -> filelock.BaseFileLock:
        if self.note:
            return filelock.SoftFileLock(self.folder / "locks" / f"{name}.held", poll_interval=_POLL)
        # The system releases it when its process ends, however it ends.
        return filelock.FileLock(self.folder / "locks" / name, poll_interval=_POLL)

    @contextmanager
    def _folder_named(self):
        try:
            yield
        except (RemoteError, filelock.Timeout):
            raise
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise RemoteError(f"key 'data.cache': {self.folder}: cannot be written ({why}); name another folder") from None

    def _download(self, url: str, size: int, sha256: str, path: Path, wait: bool) -> bool:
        """Make the copy; the caller holds its lock. False if there is no room now and `wait` is false."""
        if size > self.limit_bytes:
            raise RemoteError(
                f"{url}: {size / 1e9:.3g} GB, but {self.folder} may hold {self.limit_bytes / 1e9:.3g} GB; raise key 'data.cache_gb'"
            )
        part = path.with_suffix(".part")
        for _ in range(2):
            try:
                if not self._reserve(part, size, wait):
                    return False
                remote.fetch(url, size, part)
                with part.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found == sha256.lower():
                    # Not while another process adds up the sizes: it would count the copy twice.
                    with self._lock("room"):
                        os.replace(part, path)
                    return True
            finally:
                part.unlink(missing_ok=True)
        raise RemoteError(f"{url}: its digest is {found}, expected {sha256}; make the index or upload the shard again")

    def _reserve(self, part: Path, size: int, wait: bool) -> bool:
        """Create `part` with `size` bytes, for which older copies are removed. False if there is no room and `wait` is false."""
        part.unlink(missing_ok=True)
        while True:
            with self._lock("room"):
                copies, unfinished = self._contents()
                if unfinished + size <= self.limit_bytes:
                    while unfinished + size + sum(copy.bytes for copy in copies) > self.limit_bytes:
                        copies.pop().path.unlink(missing_ok=True)
                    self._create(part, size, copies)
                    return True
            if not wait:
                return False
            time.sleep(_POLL)

    def _contents(self) -> tuple[list[_Copy], int]:
        """Finished copies, the least recently used last, and the bytes of unfinished ones. Those of dead processes are removed."""
        copies, unfinished = [], 0
        for path in self.folder.iterdir():
            if not _OURS.fullmatch(path.name):
                continue
            with suppress(FileNotFoundError):
                found = path.stat()
                if path.suffix == ".tar":
                    copies.append(_Copy(found.st_mtime, found.st_size, path))
                    continue
                try:
                    with self._lock(path.stem).acquire(blocking=False):
                        path.unlink()
                except filelock.Timeout:
                    unfinished += found.st_size
        return sorted(copies, reverse=True), unfinished

    def _create(self, part: Path, size: int, copies: list[_Copy]) -> None:
        """Create the file and allocate its bytes; while the disk is full, `copies` are removed."""
        with part.open("wb") as file:
            while True:
                try:
                    if hasattr(os, "posix_fallocate") and size:
                        os.posix_fallocate(file.fileno(), 0, size)
                    file.truncate(size)
                    return
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                if not copies:
                    break
                copies.pop().path.unlink(missing_ok=True)
        part.unlink()
        raise RemoteError(
            f"key 'data.cache': {self.folder}: the disk is full ({size / 1e9:.3g} GB needed); free some, name another folder, "
            f"or lower 'data.cache_gb'"
        )
