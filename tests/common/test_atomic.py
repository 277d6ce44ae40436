"""Files and locks on file systems that can do less."""

import errno
import os

import pytest

from dnal_dist.common import atomic, lock
from dnal_dist.common.errors import InputError
from dnal_dist.training import run_folder


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synced_is_written_with_a_warning(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def only_files(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    monkeypatch.setattr(atomic, "weaker", set())
    for _ in range(2):
        atomic.replace(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    (remark,) = atomic.weaker
    assert remark.startswith(f"its file system cannot wait for its disk (fsync: {os.strerror(number)})")


def test_an_fsync_that_fails_names_itself_and_the_file(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"fsync: Input/output error: '{tmp_path}/.a.unfinished'"):
        atomic.replace(tmp_path / "a", b"new")


@pytest.mark.parametrize("number", [37, 95, 524, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, number):
    import fcntl

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    held, (remark,) = run_folder.lock_folder(tmp_path)
    assert held is None and remark.startswith(f"{tmp_path}: its file system has no locks (")


def test_a_lock_has_one_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0)
    one = lock.Lock(tmp_path / ".lock", 0)
    with pytest.raises(InputError, match="another process trains in"):
        run_folder.lock_folder(tmp_path)
    one.release()
    one.release()
    lock.Lock(tmp_path / ".lock", 0).release()
