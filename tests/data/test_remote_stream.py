"""Streams and whole runs over shards that live on an HTTP server or in a bucket: the batches of the local files."""

import itertools
import json
import threading
import time
from collections import Counter

import pytest
from faulty import samples, write_tar
from servers import FileServer, s3_server, without_proxies
from test_receipts import receipts

from data_tools import index
from dnal_dist.common.errors import InputError
from dnal_dist.data import remote, shardlist
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.shards import Shards
from dnal_dist.recipe import Data


@pytest.fixture(autouse=True)
def direct_and_patient(monkeypatch):
    without_proxies(monkeypatch)
    shardlist.remote_index.cache_clear()


@pytest.fixture
def server(digits):
    with FileServer() as server:
        server.files = {path.name: path.read_bytes() for path in digits.iterdir()}
        yield server


def data(where, cache, **changes) -> Data:
    settings = {"train": f"{where}/train-{{000000..000003}}.tar", "val": f"{where}/val-*.tar", "image_size": 8}
    return Data(**settings | {"global_batch": 48, "workers": 0, "cache": str(cache)} | changes)


def opened(settings: Data, rank: int = 0, world_size: int = 1, train: bool = True) -> Stream:
    found = Shards(settings.train if train else settings.val, "data.train", 10, settings)
    return Stream(found, settings, 0, train, rank, world_size)


def tallies(stream: Stream, count: int) -> list[tuple]:
    batches = stream.batches()
    found = [(batch.keys, batch.tally, batch.images.sum().item()) for batch in itertools.islice(batches, count)]
    batches.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_the_batches_are_those_of_the_local_files(server, digits, tmp_path, workers, train):
    local = tallies(opened(data(digits, tmp_path), train=train), 40)
    assert tallies(opened(data(server.url, tmp_path, workers=workers), train=train), 40) == local
    # Each shard once, however many processes read it; a pattern with wildcards is matched against the index.
    sent = {name: count for name, count in server.sent.items() if name.endswith(".tar")}
    assert sent == {name: len(server.files[name]) for name in sent} and len(sent) == (4 if train else 2)


def test_faults_of_the_server_change_nothing(server, digits, tmp_path):
    local = tallies(opened(data(digits, tmp_path)), 40)
    server.statuses, server.cuts, server.cut_after, server.short, server.trickle = [503, 429, 500], 3, 100_000, 1, 0.001
    assert tallies(opened(data(server.url, tmp_path, workers=1)), 40) == local


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Twelve shards of 20 samples, and their index."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(12):
        write_tar(folder / f"train-{number:02}.tar", {f"{number}-{name}": one for name, one in samples(20).items()})
    index.make(sorted(folder.glob("*.tar")), None, None, 1)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_few_shards_at_a_time_pass_through_a_small_cache(many, tmp_path, workers):
    """Room for six of twelve shards, three epochs: cache and open files never hold more, the order is that of the local files."""
    size = (many / "train-00.tar").stat().st_size
    few = {"train": "{}/train-{{00..11}}.tar", "shuffle_shards": 1, "workers": workers, "global_batch": 8}
    local = tallies(opened(data(many, tmp_path, **few | {"train": few["train"].format(many)})), 90)
    with FileServer() as server:
        server.files = {path.name: path.read_bytes() for path in many.iterdir()}
        stream = opened(data(many, tmp_path, **few | {"train": few["train"].format(server.url), "cache_gb": 6.5 * size / 1e9}))
        batches, seen = stream.batches(), []
        for batch in itertools.islice(batches, 90):
            seen.append((batch.keys, batch.tally, batch.images.sum().item()))
            assert len(list(tmp_path.glob("*.tar"))) <= 6
            assert len(stream.shards.files.descriptors) <= 4
        batches.close()
    assert seen == local


def test_a_cache_that_is_too_small_is_refused(server, tmp_path):
    message = r"key 'data\.cache_gb': 0\.002 GB, but 4 shards of 'data\.train' may be in use at a time, .* raise it, or lower"
    with pytest.raises(InputError, match=message):
        opened(data(server.url, tmp_path, cache_gb=0.002))


def test_a_set_that_fits_is_prefetched_once(server, tmp_path):
    """All needs of a set that fits are one pass over it, whatever the limit."""
    stream = opened(data(server.url, tmp_path))
    for start in (0, 7, 1000):
        assert sorted(need.url for need in stream.ahead.plan(start)) == [f"{server.url}/train-00000{i}.tar" for i in range(4)]


def test_shards_are_prefetched_before_they_are_read(server, tmp_path, monkeypatch):
    """A link of 50 ms and steps of 100: after the first batch no reader has to fetch a shard itself."""
    waited = []
    fetch = remote.fetch

    def counting(url, size, path):
        waited.extend([url] if threading.current_thread() is threading.main_thread() else [])
        fetch(url, size, path)

    monkeypatch.setattr(remote, "fetch", counting)
    server.latency = 0.05
    batches = opened(data(server.url, tmp_path, shuffle_shards=1)).batches()
    next(batches)
    first = len(waited)
    for _ in range(29):
        time.sleep(0.1)
        next(batches)
    batches.close()
    assert len(waited) == first <= 2


def test_what_is_missing_or_wrong_is_named(server, digits, tmp_path):
    with pytest.raises(
        InputError, match=r"nowhere/index\.json: cannot be read \(HTTP 404 Not Found\); remote shards need their index: make it"
    ):
        opened(data(f"{server.url}/nowhere", tmp_path))
    old = json.loads(server.files["index.json"])
    for entry in old["shards"]:
        del entry["sha256"]
    server.files["old/index.json"] = json.dumps(old).encode()
    with pytest.raises(InputError, match=r"old/index\.json: has no offsets or digest of train-000000\.tar"):
        opened(data(f"{server.url}/old", tmp_path))
    del server.files["train-000002.tar"]
    with pytest.raises(InputError, match=r"train-000002\.tar: cannot be read \(HTTP 404 Not Found\)"):
        tallies(opened(data(server.url, tmp_path)), 1)
    server.files["train-000002.tar"] = server.files["train-000001.tar"].ljust(
        len((digits / "train-000002.tar").read_bytes()), b"\0"
    )
    with pytest.raises(InputError, match=r"train-000002\.tar: its digest is "):
        tallies(opened(data(server.url, tmp_path)), 1)


def test_a_run_of_two_processes_trains_from_a_bucket(digits, tmp_path, monkeypatch, train_command, train_here):
    """Its receipts are those of the same run from local files; no secret is in what it prints or leaves behind."""
    secret = "Secret-Of-A-Bucket"
    few = ("phases.pretrain.steps=5", "phases.search.epochs=1", "phases.finetune.steps=3", "tracking.tracker=none")
    few += ("data.global_batch=128", "architecture.recalibration_batches=2", "tracking.plots=false")
    with s3_server(monkeypatch, secret) as client:
        client.create_bucket(Bucket="shards")
        for path in digits.iterdir():
            client.put_object(Bucket="shards", Key=f"digits/{path.name}", Body=path.read_bytes())

        def given(where, folder: str) -> list[str]:
            shards = (f"data.train={where}/train-*.tar", f"data.val={where}/val-{{000000..000001}}.tar")
            return ["recipes/digits.yaml", *shards, f"data.cache={tmp_path}/cache", f"output={tmp_path}/{folder}", *few]

        ended = train_command(*given("s3://shards/digits", "far"), processes=2)
        assert ended.returncode == 0, ended.stderr
        assert secret not in ended.stdout + ended.stderr and "GB elsewhere, read through copies in" in ended.stdout
        ended = train_here(*given(digits, "near"))
        assert ended.code == 0 and "GB elsewhere" not in ended.out, ended.err
    assert receipts(tmp_path / "far") == receipts(tmp_path / "near")
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 6
    kept = [path.read_bytes() for path in (tmp_path / "far").rglob("*") if path.is_file()]
    assert not any(secret.encode() in content for content in kept)


def test_eight_ranks_download_each_shard_once(server, tmp_path):
    streams = [opened(data(server.url, tmp_path), rank, 8) for rank in range(8)]
    seen = Counter(key for stream in streams for keys, *_ in tallies(stream, 30) for key in keys)
    assert set(seen.values()) == {1} and len(seen) == 1440
    assert all(server.sent[name] == len(server.files[name]) for name in server.files if name.startswith("train"))
