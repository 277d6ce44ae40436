"""Shards: where samples lie in a tar, whatever it holds, and what one sample's bytes are taken for."""

import io
import itertools
import random
import tarfile

import pytest
import webdataset

from dnal_dist.data.samples import Fault, Sample, SampleFormat, parse
from dnal_dist.data.shards import Shards
from dnal_dist.data.tar import boundaries


def tar_of(*members, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of (name, content) or tarfile.TarInfo."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


TEN = SampleFormat(10)


def samples(data: bytes) -> list[Sample | str]:
    """Every sample of a tar, or why it cannot be used."""
    offsets, _ = boundaries(io.BytesIO(data))
    found = []
    for begin, end in itertools.pairwise(offsets):
        try:
            found.append(parse(data[begin:end], TEN))
        except Fault as fault:
            found.append(fault.reason)
    return found


def pair(key: str, image: bytes = b"pixels", label: bytes = b"3") -> tuple:
    return (f"{key}.jpg", image), (f"{key}.cls", label)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("key", ["a", "n01/a", "k" * 90, "long/" * 40 + "a", "Ä/ö", "a=b c"])
def test_shards_of_webdatasets_own_writer_are_read_without_tarfile(key, tmp_path, monkeypatch):
    """It puts a pax header, with the time to the nanosecond, before each member."""
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for number in range(3):
            tar.write({"__key__": f"{key}{number}", "jpg": bytes([number]) * 700, "cls": str(number)})
    data = (tmp_path / "a.tar").read_bytes()
    assert b"mtime=" in data
    offsets, faults = boundaries(io.BytesIO(data))
    monkeypatch.setattr(tarfile, "TarFile", None)
    found = [parse(data[begin:end]) for begin, end in itertools.pairwise(offsets)]
    assert not faults
    assert found == [Sample(f"{key}{number}", bytes([number]) * 700, "jpg", number) for number in range(3)]


def test_folders_and_headers_of_the_whole_archive_are_no_samples(tmp_path):
    folders = []
    for name in ("set.v1", "set.v1/n01"):
        folders.append(tarfile.TarInfo(name))
        folders[-1].type = tarfile.DIRTYPE
    data = tar_of(folders[0], *pair("set.v1/a"), folders[1], *pair("set.v1/n01/b"))
    assert [sample.key for sample in samples(data)] == ["set.v1/a", "set.v1/n01/b"]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers={"comment": "made elsewhere"}) as tar:
        for name, content in (*pair("a"), *pair("b")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert [sample.key for sample in samples(out.getvalue())] == ["a", "b"]
    assert boundaries(out)[1] == []


def test_shards_that_were_read_can_be_sent_to_another_process(tmp_path):
    """As to loader processes that are not forked: open files have other numbers there."""
    import multiprocessing.reduction

    (tmp_path / "s.tar").write_bytes(tar_of(*pair("a"), *pair("b")))
    shards = Shards(f"{tmp_path}/s.tar", "data.train", 10)
    assert shards[1].key == "b" and shards.files.descriptors
    other = multiprocessing.reduction.ForkingPickler.loads(multiprocessing.reduction.ForkingPickler.dumps(shards))
    assert not other.files.descriptors and other[1].key == "b"
    shards.close()
    assert not shards.files.descriptors and other[0].key == "a"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["a", "n01/a", "./a", "k" * 90, "long/" * 40 + "a", "Ä/ö"])
def test_every_format_and_length_of_name_is_read(form, key):
    if form == tarfile.USTAR_FORMAT and len(key) > 200:
        key = "d/" * 60 + "a"
    data = tar_of(*pair(key), *pair("b", b"x" * 513, b" 7\n"), form=form)
    assert samples(data) == [Sample(key, b"pixels", "jpg", 3), Sample("b", b"x" * 513, "jpg", 7)]


def test_samples_are_webdatasets(tmp_path):
    """Folders, files without a dot, meta files, upper case, other members: the same samples as stock webdataset's."""
    folder = tarfile.TarInfo("n01")
    folder.type = tarfile.DIRTYPE
    members = [
        folder,
        ("README", b"hello"),
        ("__meta__.json__", b"{}"),
        *pair("n01/a"),
        ("n01/a.json", b"{}"),
    ]
    members += [("n01/b.JPG", b"B"), ("n01/b.cls", b"0"), ("c.1.txt", b"?"), ("c.png", b"C"), ("c.cls", b"9")]
    (tmp_path / "a.tar").write_bytes(tar_of(*members))
    stock = [
        (s["__key__"], next(s[e] for e in ("jpg", "png") if e in s), int(s["cls"]))
        for s in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    ]
    assert [(one.key, one.image, one.label) for one in samples((tmp_path / "a.tar").read_bytes())] == stock
    assert len(stock) == 3


@pytest.mark.parametrize(
    "members, reason",
    [
        ([("a.jpg", b"x")], "found 1 and 0"),
        ([("a.cls", b"1")], "found 0 and 1"),
        ([("a.gif", b"x"), ("a.cls", b"1")], "found 0 and 1"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], "found 2 and 1"),
        (pair("a", label=b"10"), "label '10' is out of range, expected a whole number from 0 to 9"),
        (pair("a", label=b"-1"), "label '-1'"),
        (pair("a", label=b"\x1b[2J\xff"), r"label '\x1b[2J\xff'"),
        ([*pair("a"), ("a.pyd", b"x")], ".pyd, which is refused"),
        ([*pair("a"), ("a.pickle", b"x")], ".pickle, which is refused"),
        ([*pair("a"), ("a.meta.PTH", b"x")], ".meta.pth, which is refused"),
        ([link("a.jpg", "/etc/passwd"), ("a.cls", b"1")], "link"),
        ([link("a.jpg", "b.jpg", tarfile.LNKTYPE), ("a.cls", b"1")], "link"),
        ([link("a.jpg", "", tarfile.FIFOTYPE), ("a.cls", b"1")], "special file"),
        (pair("../a"), "leads out of the shard"),
        (pair("x/../../a"), "leads out of the shard"),
        (pair("/etc/a"), "leads out of the shard"),
    ],
)
def test_a_bad_sample_is_refused_with_its_reason_and_its_neighbours_are_not(members, reason):
    before, found, after = samples(tar_of(*pair("p"), *members, *pair("q")))
    assert (before.key, after.key) == ("p", "q")
    assert reason in found


def test_a_key_cannot_speak_to_a_terminal():
    (sample,) = samples(tar_of(*pair("a\x1b[2Jb")))
    assert sample.key == r"a\x1b[2Jb"


def test_a_label_is_checked_only_where_the_number_of_classes_is_known():
    assert parse(tar_of(*pair("a", label=b"10"))).label == 10


def test_a_truncated_shard_gives_its_whole_samples():
    whole = tar_of(*(member for i in range(6) for member in pair(f"k{i}", bytes(700))))
    reference = samples(whole)
    for cut in range(0, len(whole), 256):
        found = samples(whole[:cut])
        good = [sample for sample in found if isinstance(sample, Sample)]
        assert good == reference[: len(good)] and len(found) - len(good) <= 1
        # Each sample takes 512 + 1024 + 512 + 512 bytes, of which the padding behind the label may be missing.
        assert len(good) >= min(cut // 2560, 6)
    offsets, faults = boundaries(io.BytesIO(whole[: 2560 * 3]))
    assert len(offsets) == 4 and "cut short" in faults[0][1]
    assert boundaries(io.BytesIO(whole))[1] == []


def test_behind_a_damaged_header_the_next_sample_is_found():
    whole = tar_of(*(member for i in range(6) for member in pair(f"k{i}")))
    for damaged in range(12):
        data = bytearray(whole)
        data[damaged * 1024 + 3] ^= 0xFF
        offsets, faults = boundaries(io.BytesIO(data))
        good = [sample.key for sample in samples(bytes(data)) if isinstance(sample, Sample)]
        assert good == [f"k{i}" for i in range(6) if i != damaged // 2], damaged
        assert faults
        # With the offsets of the whole shard, as an index has them, one sample is bad and no other.
        offsets, _ = boundaries(io.BytesIO(whole))
        bad = 0
        for begin, end in itertools.pairwise(offsets):
            try:
                parse(bytes(data[begin:end]))
            except Fault:
                bad += 1
        assert bad == 1


def test_random_damage_never_does_more_than_lose_samples():
    """2 000 shards with flipped, cut and doubled bytes: no other exception, no endless loop, no sample that was not there."""
    rng = random.Random(0)
    whole = tar_of(*(member for i in range(5) for member in pair(f"k{i}" if i % 2 else "long/" * 30 + f"k{i}", bytes([i]) * 600)))
    true = set(samples(whole))
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for sample in samples(bytes(data)):
            if isinstance(sample, Sample):
                # Damage inside an image is for the decoder to see.
                assert sample.extension == "jpg" and len(sample.image) in {len(one.image) for one in true} | {0, *range(1200)}


def test_hidden_files_of_a_mac_are_no_samples():
    assert [s.key for s in samples(tar_of(("._a.jpg", b"?"), *pair("a"), ("n/._b.jpg", b"?"), *pair("n/b")))] == ["a", "n/b"]


def test_a_file_that_is_no_tar_has_no_samples():
    for data in (b"", b"no tar at all", bytes(10240), random.Random(1).randbytes(5000)):
        offsets, _ = boundaries(io.BytesIO(data))
        assert len(offsets) == 1 or all(isinstance(sample, str) for sample in samples(data))


def test_a_fault_names_its_place(tmp_path):
    data = tar_of(*pair("a"), *pair("b", label=b"x"))
    (tmp_path / "s.tar").write_bytes(data)
    shards = Shards(f"{tmp_path}/s.tar", "data.train", 10)
    assert shards.samples == 2 and shards[0].key == "a"
    with pytest.raises(Fault, match=r"s\.tar: sample b at byte 2048: label 'x' is out of range"):
        shards[1]
    assert [shards.name(i) for i in range(2)] == ["0/s.tar/0/a", "0/s.tar/2048/b"]
