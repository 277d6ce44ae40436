"""Shards are fetched before they are read, within a limit, in any number of processes and whatever becomes of them."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from remote_files import SHARDS, SIZE, ended_well, shard, start, until
from servers import FileServer

from dnal_dist.data.cache import Cache
from dnal_dist.data.prefetch import Need, Prefetcher
from dnal_dist.data.remote import RemoteError


def plan_of(server: FileServer, positions: list[int]) -> Callable:
    return lambda begin: (Need(at, *shard(server, n)) for n, at in enumerate(positions) if at >= begin)


def test_the_next_shards_are_fetched_within_the_limit(server, tmp_path):
    cache = Cache(tmp_path, 10**9)
    prefetcher = Prefetcher(cache, plan_of(server, [0, 1, 1, 2, 5, 7]), 3 * SIZE)
    held = lambda *numbers: all(cache.has(*shard(server, n)) for n in numbers)  # noqa: E731
    prefetcher.at(0)
    until(lambda: held(0, 1, 2))
    prefetcher.at(1)
    until(lambda: held(3))
    assert {path for path, _ in server.requests} == {"0.tar", "1.tar", "2.tar", "3.tar"}
    prefetcher.at(3)
    until(lambda: held(4, 5))
    prefetcher.close()
    assert server.sent == dict.fromkeys(SHARDS, SIZE)


def test_one_shard_above_the_limit_is_fetched_and_passed_ones_are_not(server, tmp_path):
    cache = Cache(tmp_path, 10**9)
    prefetcher = Prefetcher(cache, lambda begin: (Need(n, *shard(server, n)) for n in range(6)), 1)
    prefetcher.at(4)
    until(lambda: bool(cache.has(*shard(server, 4))))
    prefetcher.at(5)
    until(lambda: bool(cache.has(*shard(server, 5))))
    prefetcher.close()
    assert server.sent == {"4.tar": SIZE, "5.tar": SIZE}


def test_going_back_restarts_the_plan(server, tmp_path):
    cache = Cache(tmp_path, 10**9)
    prefetcher = Prefetcher(cache, plan_of(server, [0, 1, 2, 3, 4, 5]), SIZE)
    prefetcher.at(5)
    until(lambda: bool(cache.has(*shard(server, 5))))
    prefetcher.at(2)
    until(lambda: bool(cache.has(*shard(server, 2))))
    prefetcher.close()


def test_a_fault_stops_neither_the_thread_nor_its_caller(server, tmp_path):
    cache = Cache(tmp_path, 10**9)
    missing = Need(0, f"{server.url}/none.tar", SIZE, "0" * 64)
    prefetcher = Prefetcher(cache, lambda begin: iter([missing, missing, Need(1, *shard(server, 1))]), 10**9, downloads=1)
    prefetcher.at(0)
    until(lambda: bool(cache.has(*shard(server, 1))))
    prefetcher.close()
    with pytest.raises(RemoteError, match="404"):
        cache.get(*missing[1:])


def test_a_shard_that_another_process_downloads_is_skipped(server, tmp_path):
    server.stalls = 1
    other = start(server, tmp_path, "cache.get(*shards[0])")
    until(lambda: len(server.requests) == 1)
    cache = Cache(tmp_path, 10**9)
    prefetcher = Prefetcher(cache, plan_of(server, [0, 1]), 10**9, downloads=1)
    prefetcher.at(0)
    until(lambda: bool(cache.has(*shard(server, 1))))
    assert cache.has(*shard(server, 0)) is None
    server.released.set()
    ended_well(other)
    prefetcher.close()
    assert server.sent == {"0.tar": SIZE, "1.tar": SIZE}


def test_a_process_ends_while_its_downloads_hang(server, tmp_path):
    server.stalls = 100
    program = """
prefetcher = Prefetcher(cache, lambda begin: (Need(n, *one) for n, one in enumerate(shards)), 10**9)
prefetcher.at(0)
while len(list(Path(folder).glob("*.part"))) < 2:
    time.sleep(0.01)
"""
    ended_well(start(server, tmp_path, program))
    server.stalls = 0
    cache = Cache(tmp_path, 10**9)
    assert cache.get(*shard(server, 0)).read_bytes() == SHARDS["0.tar"]


def test_a_forked_process_prefetches_with_threads_of_its_own(server, tmp_path):
    program = """
prefetcher = Prefetcher(cache, lambda begin: (Need(n, *one) for n, one in enumerate(shards) if n >= begin), 1)
prefetcher.at(0)
while not cache.has(*shards[0]):
    time.sleep(0.01)
child = os.fork()
if not child:
    prefetcher.at(3)
    while not cache.has(*shards[3]):
        time.sleep(0.01)
    os._exit(0)
os.waitpid(child, 0)
print(cache.has(*shards[1]))
"""
    process = start(server, tmp_path, program)
    assert ended_well(process).strip() == "None"
    assert server.sent == {"0.tar": SIZE, "3.tar": SIZE}


class Reading:
    """A data set whose item is the digest of a shard, read through the cache while it prefetches."""

    def __init__(self, server: FileServer, folder: Path):
        self.shards = [shard(server, number) for number in range(len(SHARDS))]
        self.cache = Cache(folder, 10**9)
        self.prefetcher = Prefetcher(
            self.cache, lambda begin: (Need(n, *one) for n, one in enumerate(self.shards) if n >= begin), 10**9
        )

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> tuple[int, str]:
        self.prefetcher.at(number)
        with open(self.cache.open(*self.shards[number]), "rb") as file:
            return os.getpid(), hashlib.sha256(file.read()).hexdigest()


def test_forked_loader_processes_read_and_prefetch(server, tmp_path):
    from torch.utils.data import DataLoader

    data = Reading(server, tmp_path)
    # The training process has connections, threads and an event loop of its own before it forks.
    assert data[0][1] == data.shards[0][2]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", persistent_workers=True)
    for _ in range(2):
        found = list(loader)
        assert [digest for _, digest in found] == [sha256 for *_, sha256 in data.shards]
        assert len({pid for pid, _ in found} | {os.getpid()}) == 3
    del loader
    data.prefetcher.close()
    assert server.sent == dict.fromkeys(SHARDS, SIZE)
