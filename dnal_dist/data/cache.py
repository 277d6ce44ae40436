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

from dnal_dist.data import remote
from dnal_dist.data.remote import RemoteError

# Only such files are counted and removed: the folder may hold others.
_OURS = re.compile(r"[0-9a-f]{40}\.(tar|part)")
_POLL = 0.05  # seconds between two looks at what another process holds


class _Copy(NamedTuple):
    used: float
    bytes: int
    path: Path


class Cache:
    """Copies of remote shards in `folder`, together at most `limit_bytes`; the least recently used go first.

    Any number of processes may use one folder. A copy that is being made counts in full and is never removed; a copy that someone
    has open may be, and stays readable to them, so its space comes free when they close it. Instances hold no open files and no
    threads: they may be sent to other processes and used on both sides of a fork.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = Path(folder).expanduser(), limit_bytes
        with self._faults_named():
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)

    def get(self, url: str, size: int, sha256: str) -> Path:
        """The copy of the shard at `url`, of `size` bytes and this digest (64 hexadecimal digits), once there is one.

        One process downloads it and the others wait. Another process may remove the copy at any time: `open` gives one that stays.
        Raises RemoteError if the shard cannot be had, is larger than the cache, or is twice not the one that the digest tells of.
        """
        path = self._path(url, sha256)
        with self._faults_named():
            if not self.has(url, size, sha256):
                with self._lock(path.stem):
                    if not self.has(url, size, sha256):
                        self._download(url, size, sha256, path, wait=True)
        return path

    def open(self, url: str, size: int, sha256: str) -> int:
        """A file descriptor of the copy, for reading, which the caller closes. Raises as `get` does."""
        while True:
            try:
                return os.open(self.get(url, size, sha256), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                # Removed in between, to make room.
                continue

    def has(self, url: str, size: int, sha256: str) -> Path | None:
        """The copy, if it is there, marked as just used. Never waits."""
        path = self._path(url, sha256)
        try:
            if path.stat().st_size != size:
                return None
        except FileNotFoundError:
            return None
        with suppress(OSError):  # of another user, or gone already
            os.utime(path)
        return path

    def try_get(self, url: str, size: int, sha256: str) -> bool:
        """True once the copy is there; False at once if another process is downloading it, or if downloads leave no room now.

        Raises as `get` does.
        """
        path = self._path(url, sha256)
        with self._faults_named():
            if self.has(url, size, sha256):
                return True
            try:
                with self._lock(path.stem).acquire(blocking=False):
                    return bool(self.has(url, size, sha256)) or self._download(url, size, sha256, path, wait=False)
            except filelock.Timeout:
                return False

    def _path(self, url: str, sha256: str) -> Path:
        # A hash of both: nothing from an index or a recipe becomes part of a path.
        return self.folder / f"{hashlib.sha256(f'{sha256.lower()} {url}'.encode()).hexdigest()[:40]}.tar"

    def _lock(self, name: str) -> filelock.FileLock:
        # The system lets go of it when its process ends, however it ends.
        return filelock.FileLock(self.folder / "locks" / name, poll_interval=_POLL)

    @contextmanager
    def _faults_named(self):
        try:
            yield
        except (RemoteError, filelock.Timeout):
            raise
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise RemoteError(f"key 'data.cache': {self.folder}: cannot be written ({why}); name another folder") from None

    def _download(self, url: str, size: int, sha256: str, path: Path, wait: bool) -> bool:
        """Make the copy; the caller holds its lock. False if there is no room now and it is not to `wait` for it."""
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
                    # What others count must not change its name while they do.
                    with self._lock("room"):
                        os.replace(part, path)
                    return True
            finally:
                part.unlink(missing_ok=True)
        raise RemoteError(f"{url}: its digest is {found}, expected {sha256}; make the index or upload the shard anew")

    def _reserve(self, part: Path, size: int, wait: bool) -> bool:
        """Create `part` with `size` bytes of room, for which older copies go. False if there is none and it is not to `wait`."""
        part.unlink(missing_ok=True)
        while True:
            with self._lock("room"):
                copies, unfinished = self._look()
                if unfinished + size <= self.limit_bytes:
                    while unfinished + size + sum(copy.bytes for copy in copies) > self.limit_bytes:
                        copies.pop().path.unlink(missing_ok=True)
                    self._create(part, size, copies)
                    return True
            if not wait:
                return False
            time.sleep(_POLL)

    def _look(self) -> tuple[list[_Copy], int]:
        """All copies, the least recently used last, and the bytes of those that are being made; what a dead process left goes."""
        copies, unfinished = [], 0
        for path in self.folder.iterdir():
            if not _OURS.fullmatch(path.name):
                continue
            with suppress(FileNotFoundError):
                found = path.stat()
                if path.suffix == ".tar":
                    copies.append(_Copy(found.st_mtime, found.st_size, path))
                elif self._is_abandoned(path):
                    path.unlink()
                else:
                    unfinished += found.st_size
        return sorted(copies, reverse=True), unfinished

    def _is_abandoned(self, part: Path) -> bool:
        try:
            with self._lock(part.stem).acquire(blocking=False):
                return True
        except filelock.Timeout:
            return False

    def _create(self, part: Path, size: int, copies: list[_Copy]) -> None:
        """Create the file with its room on the disk, for which copies go if the disk is full."""
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
            f"key 'data.cache': {self.folder}: the disk is full ({size / 1e9:.3g} GB are wanted); free some, name another "
            f"folder, or lower 'data.cache_gb'"
        )
