"""The cache of shards: parallel processes, killed ones, its limit, digests."""

import errno
import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from remote_files import SHARDS, SIZE, ended_well, files, shard, start, until

from dnal_dist.data import remote
from dnal_dist.data.cache import Cache
from dnal_dist.data.remote import RemoteError


# One copy
def test_a_copy_is_made_once_and_found_again(server, tmp_path):
    cache = Cache(tmp_path / "copies", 10**6)
    url, size, sha256 = shard(server, 0)
    assert cache.has(url, size, sha256) is None
    path = cache.get(url, size, sha256)
    assert path.read_bytes() == SHARDS["0.tar"]
    assert cache.get(url, size, sha256.upper()) == path == cache.has(url, size, sha256)
    assert len(server.requests) == 1 and files(cache.folder) == [".tar"]


def test_file_names_depend_on_url_and_digest_alone(server, tmp_path):
    cache = Cache(tmp_path / "copies", 10**6)
    _, size, sha256 = shard(server, 0)
    server.files |= {"../../0.tar": SHARDS["0.tar"], "x/0.tar": SHARDS["0.tar"]}
    paths = {cache.get(f"{server.url}/{name}", size, sha256) for name in ("0.tar", "x/0.tar")}
    other = hashlib.sha256(SHARDS["1.tar"]).hexdigest()
    server.files["0.tar"] = SHARDS["1.tar"]
    paths.add(cache.get(f"{server.url}/0.tar", size, other))
    assert len(paths) == 3 and {path.parent for path in paths} == {cache.folder}
    assert cache._path("../../etc/passwd", "../..").parent == cache.folder


def test_a_wrong_digest_is_fetched_once_more(server, tmp_path):
    cache = Cache(tmp_path, 10**6)
    url, size, sha256 = shard(server, 0)
    server.files["0.tar"] = SHARDS["1.tar"]
    found = hashlib.sha256(SHARDS["1.tar"]).hexdigest()
    with pytest.raises(RemoteError, match=rf"/0\.tar: its digest is {found}, expected {sha256}"):
        cache.get(url, size, sha256)
    assert len(server.requests) == 2 and files(tmp_path) == []
    server.files["0.tar"] = SHARDS["0.tar"]
    assert cache.get(url, size, sha256).read_bytes() == SHARDS["0.tar"]


def test_a_copy_of_another_length_is_not_used(server, tmp_path):
    cache = Cache(tmp_path, 10**6)
    os.truncate(cache.get(*shard(server, 0)), SIZE - 1)
    assert cache.has(*shard(server, 0)) is None
    assert cache.get(*shard(server, 0)).read_bytes() == SHARDS["0.tar"]


def test_damage_in_transfer_is_mended(server, tmp_path):
    cache = Cache(tmp_path, 10**6)
    bodies = [SHARDS["1.tar"], SHARDS["0.tar"]]

    class Changing(dict):
        def __getitem__(self, name):
            return bodies.pop(0)

    server.files = Changing(server.files)
    assert cache.get(*shard(server, 0)).read_bytes() == SHARDS["0.tar"]


def test_a_missing_shard_leaves_nothing(server, tmp_path):
    cache = Cache(tmp_path, 10**6)
    with pytest.raises(RemoteError, match="404"):
        cache.get(f"{server.url}/none.tar", SIZE, "0" * 64)
    with pytest.raises(RemoteError, match="404"):
        cache.try_get(f"{server.url}/none.tar", SIZE, "0" * 64)
    assert files(tmp_path) == []


def test_a_fault_in_transfer_does_not_repeat_the_whole_shard(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 16_384)
    server.cut_after, server.cuts, server.statuses = 10_000, 4, [503, 503]
    assert Cache(tmp_path, 10**6).get(*shard(server, 0)).read_bytes() == SHARDS["0.tar"]
    assert server.sent["0.tar"] <= SIZE + 4 * 10_000


def test_a_shard_larger_than_the_cache_is_refused(server, tmp_path):
    with pytest.raises(RemoteError, match=r"0\.tar: .*data\.cache_gb"):
        Cache(tmp_path, SIZE - 1).get(*shard(server, 0))
    assert not server.requests


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RemoteError, match=r"^key 'data\.cache': .*file/copies: .*name another folder$"):
        Cache(tmp_path / "file" / "copies", 10**6)


# Room
def test_the_least_recently_used_are_removed_first(server, tmp_path):
    cache = Cache(tmp_path, 3 * SIZE)
    (tmp_path / "notes.tar").write_bytes(bytes(5 * SIZE))
    for number in range(3):
        path = cache.get(*shard(server, number))
        os.utime(path, (number, number))
    assert cache.has(*shard(server, 0))
    cache.get(*shard(server, 3))
    assert [bool(cache.has(*shard(server, number))) for number in range(4)] == [True, False, True, True]
    assert (tmp_path / "notes.tar").exists()


def test_an_open_copy_stays_readable_when_it_is_removed(server, tmp_path):
    cache = Cache(tmp_path, SIZE)
    descriptor = cache.open(*shard(server, 0))
    cache.get(*shard(server, 1))
    assert cache.has(*shard(server, 0)) is None
    assert os.pread(descriptor, SIZE, 0) == SHARDS["0.tar"]
    os.close(descriptor)


def test_open_fetches_again_a_copy_removed_in_between(server, tmp_path, monkeypatch):
    cache = Cache(tmp_path, 10**6)
    get, times = cache.get, []

    def get_and_lose(*one):
        path = get(*one)
        times.append(path)
        if len(times) == 1:
            path.unlink()
        return path

    monkeypatch.setattr(cache, "get", get_and_lose)
    descriptor = cache.open(*shard(server, 0))
    assert os.pread(descriptor, SIZE, 0) == SHARDS["0.tar"]
    os.close(descriptor)


def test_an_unfinished_download_is_not_removed_for_another(server, tmp_path):
    cache = Cache(tmp_path, SIZE)
    server.stalls = 1
    slow = threading.Thread(target=cache.get, args=shard(server, 0))
    slow.start()
    until(lambda: len(server.requests) == 1)
    assert cache.try_get(*shard(server, 1)) is False
    assert cache.try_get(*shard(server, 0)) is False
    waiting = threading.Thread(target=cache.get, args=shard(server, 1))
    waiting.start()
    server.released.set()
    slow.join()
    waiting.join()
    assert cache.has(*shard(server, 1)) and cache.has(*shard(server, 0)) is None


def full_disk(monkeypatch, folder: Path, bytes_: int) -> None:
    def allocate(descriptor: int, offset: int, size: int) -> None:
        if size + sum(path.stat().st_size for path in folder.glob("*.tar")) > bytes_:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", allocate, raising=False)


def test_on_a_full_disk_older_copies_are_removed(server, tmp_path, monkeypatch):
    cache = Cache(tmp_path, 10**9)
    full_disk(monkeypatch, tmp_path, 2 * SIZE)
    for number in range(4):
        os.utime(cache.get(*shard(server, number)), (number, number))
    assert [bool(cache.has(*shard(server, number))) for number in range(4)] == [False, False, True, True]


def test_a_full_disk_without_older_copies_is_named(server, tmp_path, monkeypatch):
    full_disk(monkeypatch, tmp_path, SIZE - 1)
    with pytest.raises(RemoteError, match=r"key 'data\.cache': .*the disk is full.*'data\.cache_gb'"):
        Cache(tmp_path, 10**9).get(*shard(server, 0))
    assert files(tmp_path) == []


# Several processes
def test_parallel_processes_download_each_shard_once(server, tmp_path):
    server.latency, server.trickle = 0.05, 0.005
    program = """
print([digest(cache.open(*shards[n])) for n in random.Random(seed).sample(range(6), 6)] != [] and
      all(digest(cache.open(*one)) == one[2] for one in shards))
"""
    processes = [start(server, tmp_path, program, seed=seed) for seed in range(4)]
    assert [ended_well(process).strip() for process in processes] == ["True"] * 4
    assert server.sent == dict.fromkeys(SHARDS, SIZE)
    assert files(tmp_path) == [".tar"] * 6


def test_the_bound_holds_while_processes_contend(server, tmp_path):
    server.trickle = 0.001
    limit = 2 * SIZE + SIZE // 2
    program = """
for n in random.Random(seed).choices(range(6), k=12):
    assert digest(cache.open(*shards[n])) == shards[n][2]
"""
    processes = [start(server, tmp_path, program, seed=seed, limit=limit) for seed in range(4)]
    cache, most = Cache(tmp_path, limit), 0
    while any(process.poll() is None for process in processes):
        # Under the lock that all changes but removals take, so that a change of name is not counted twice.
        with cache._lock("room"):
            sizes = []
            for path in tmp_path.iterdir():
                if path.is_file() and path.exists():
                    try:
                        sizes.append(path.stat().st_size)
                    except FileNotFoundError:
                        continue
        most = max(most, sum(sizes))
        time.sleep(0.005)
    for process in processes:
        ended_well(process)
    assert SIZE < most <= limit
    assert set(files(tmp_path)) == {".tar"}


def test_a_killed_download_blocks_nobody_and_is_not_used(server, tmp_path):
    server.trickle = 0.2
    killed = start(server, tmp_path, "cache.get(*shards[0])")
    until(lambda: server.sent["0.tar"] > SIZE // 4)
    waiting = start(server, tmp_path, "print(digest(cache.open(*shards[0])) == shards[0][2])")
    assert files(tmp_path) == [".part"] and next(tmp_path.glob("*.part")).stat().st_size == SIZE
    server.trickle = 0
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()
    assert ended_well(waiting).strip() == "True"
    assert files(tmp_path) == [".tar"]


def test_the_rest_of_a_killed_download_makes_room(server, tmp_path):
    server.trickle = 0.2
    killed = start(server, tmp_path, "cache.get(*shards[0])")
    until(lambda: server.sent["0.tar"] > 0)
    killed.kill()
    killed.communicate()
    assert files(tmp_path) == [".part"]
    server.trickle = 0
    Cache(tmp_path, SIZE).get(*shard(server, 1))
    assert files(tmp_path) == [".tar"]
