"""Shards as they are found: images and labels of many kinds, orientation in EXIF, and members that have no reader."""

import gc
import io
import itertools
import json
import multiprocessing

import numpy as np
import pytest
import webdataset
from faulty import png, write_tar
from PIL import Image, ImageOps

from dnal_dist.common.errors import InputError
from dnal_dist.data.decoding import Header, decode, read_header
from dnal_dist.data.images import Transform
from dnal_dist.data.nvjpeg import takes
from dnal_dist.data.pipeline import stream
from dnal_dist.data.samples import Fault
from dnal_dist.data.shards import Shards
from dnal_dist.recipe import Augmentation, Data

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


def encoded(kind: str, orientation: int = 1, pixels: np.ndarray = PIXELS, **options) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, kind, exif=exif, **options)
    return file.getvalue()


def opened(folder, members: dict[str, bytes], names: list[str] | None = None, label_key: str | None = None) -> Shards:
    write_tar(folder / "s.tar", members)
    size = (folder / "s.tar").stat().st_size
    index = {"shards": [{"file": "s.tar", "samples": 0, "bytes": size}], "classes": names or []}
    (folder / "index.json").write_text(json.dumps(index))
    return Shards(f"{folder}/s.tar", "data.train", 10, data(False, label_key=label_key))


@pytest.mark.parametrize("extension", ["jpeg", "jpg", "JPG", "JPEG", "png", "PNG", "webp", "bmp", "tiff", "tif"])
def test_images_of_each_kind_are_read(tmp_path, extension):
    kind = {"JPG": "JPEG", "TIF": "TIFF"}.get(extension.upper(), extension.upper())
    options = {"lossless": True} if kind == "WEBP" else {}
    image = encoded(kind, **options)
    found = opened(tmp_path, {f"a.{extension}": image, "a.cls": b"3"})[0]
    assert (found.key, found.extension, found.label) == ("a", extension.lower(), 3)
    pixels = decode(found.image)
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(image)).convert("RGB")))
    assert kind == "JPEG" or np.array_equal(pixels, PIXELS)


@pytest.mark.parametrize("members", [{"a.cls": b"7"}, {"a.cls.txt": b" 7\n"}, {"a.txt": b"7"}, {"a.cls": b"7", "a.txt": b"A dog."}])
def test_labels_of_each_kind_are_read(tmp_path, members):
    assert opened(tmp_path, {"a.png": png(), **members})[0].label == 7


def test_classes_are_named_as_in_the_index(tmp_path):
    members = {"a.png": png(), "a.txt": b"tench\n", "b.png": png(), "b.txt": b"4", "c.png": png(), "c.txt": b"crane"}
    shards = opened(tmp_path, members, ["goldfish", "tench", "crane", "shark", "crane"])
    assert (shards[0].label, shards[1].label) == (1, 4)
    # Two classes of one name cannot be distinguished by it.
    with pytest.raises(Fault, match=r"label 'crane' is out of range, expected a whole number .*, or one of the 3 names of classes"):
        shards[2]


@pytest.mark.parametrize(
    "content, found",
    [
        (b'{"label": 5, "width": 8}', 5),
        (b'{"label": "5"}', 5),
        (b'{"label": "tench"}', 1),
        (b'{"label": 10}', "label '10' is out of range"),
        (b'{"label": true}', "neither a whole number nor a text"),
        (b'{"label": [5]}', "neither a whole number nor a text"),
        (b'{"class": 5}', "no key 'label'"),
        (b"[5]", "no object of JSON"),
        (b'{"label": 5', "no object of JSON"),
        (b"[" * 100_000, "no object of JSON"),
        (b"\xff\xfe\xfd", "no object of JSON"),
    ],
    ids=range(11),
)
def test_the_recipes_key_of_a_json_is_its_label(tmp_path, content, found):
    members = {"a.png": png(), "a.json": content, "a.cls": b"9"}
    shards = opened(tmp_path, members, ["goldfish", "tench"], "label")
    if isinstance(found, int):
        assert shards[0].label == found
    else:
        with pytest.raises(Fault, match=found):
            shards[0]


def test_members_without_a_reader_are_reported_once_by_kind_and_count(tmp_path):
    members = {}
    for i in range(6):
        members |= {f"{i}.png": png(), f"{i}.cls": b"1", f"{i}.npy": b"\x93NUMPY"} | ({f"{i}.json": b"{}"} if i % 2 else {})
    notes = ["key 'data.train': members without a reader are left alone: .json in 3, .npy in 6 of 6 samples read"]
    assert opened(tmp_path, members).notes == notes
    assert opened(tmp_path, {"a.png": png(), "a.cls": b"1", "a.txt": b"A dog."}).notes == []
    gifs = opened(tmp_path, {"a.gif": png(), "a.cls": b"1", "b.gif": png(), "b.cls": b"1"})
    assert gifs.notes[0].endswith(": .gif in 2 of 2 samples read")
    with pytest.raises(Fault, match=r"found 0 and 1, and \.gif without a reader"):
        gifs[0]


def data(exif: bool, kind: str = "none", **changes) -> Data:
    return Data(train="t", val="v", image_size=16, global_batch=1, exif=exif, augmentation=Augmentation(kind=kind), **changes)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_in_exif_is_followed_if_the_recipe_asks_for_it(kind, orientation):
    image = encoded(kind, orientation)
    stored = Image.open(io.BytesIO(image))
    turned = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert np.array_equal(decode(image, read_header(image, exif=True)), turned)
    assert np.array_equal(decode(image), np.asarray(stored.convert("RGB")))
    # Whole transforms: those of the image that was turned before it was stored.
    plain = encoded("PNG", pixels=turned)
    for train, augmentation in ((False, "none"), (True, "pad_crop")):
        ours, plainly = (Transform(data(exif, augmentation), 0, train) for exif in (True, False))
        assert np.array_equal(ours(image, 1, 2)[0], plainly(plain, 1, 2)[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_of_turned_images_are_those_of_the_upright_image(orientation):
    """At a reduced scale edges of a part may lie within a pixel."""
    coarse = Image.fromarray(PIXELS[:6, :8]).resize((640, 480), Image.Resampling.BICUBIC)
    image = encoded("JPEG", orientation, np.asarray(coarse), quality=95)
    plain = encoded("PNG", pixels=np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(image)))))
    for index in range(8):
        ours, plainly = (
            Transform(data(exif, "resized_crop"), 0, True)(one, 0, index)[0] for one, exif in ((image, True), (plain, False))
        )
        assert np.abs(ours.astype(int) - plainly).mean() < 4


@pytest.mark.parametrize("value", [0, 9, 300])
def test_an_invalid_orientation_is_ignored(value):
    assert read_header(encoded("JPEG", value), exif=True).orientation == 1


def test_nvjpeg_gets_no_image_that_has_to_be_turned():
    whole = encoded("JPEG", 6)
    assert not takes(read_header(whole, exif=True), whole) and takes(read_header(whole), whole)
    assert read_header(whole, exif=True) == Header(20, 12, "YCbCr", 6)


# --- without a recipe


def doubled(batch):
    return batch._replace(labels=2 * batch.labels)


def test_stages_can_be_appended_to_a_stream_without_a_recipe(digits):
    shards = f"{digits}/train-*.tar"
    plain = list(itertools.islice(stream(shards, image_size=8, global_batch=48), 6))
    for workers in (0, 2):
        given = {"image_size": 8, "global_batch": 48, "workers": workers}
        mapped = list(stream(shards, **given).map(doubled).slice(6))
        assert [batch.keys for batch in mapped] == [batch.keys for batch in plain]
        assert all((one.labels == 2 * other.labels).all() for one, other in zip(mapped, plain, strict=True))
        chosen = itertools.islice(stream(shards, **given).select(lambda batch: 3 in batch.labels[:3]), 3)
        assert all(3 in batch.labels[:3] for batch in chosen)
        counted = next(iter(stream(shards, **given).compose(lambda batches: map(len, (b.keys for b in batches)))))
        assert counted == 48
        within = next(iter(stream(shards, **given, stages=[webdataset.map(doubled)])))
        assert (within.labels == 2 * plain[0].labels).all()
    assert isinstance(stream(shards, image_size=8, global_batch=48), webdataset.DataPipeline)


def test_a_stream_without_a_recipe_starts_at_any_batch_on_any_ranks(digits):
    given = {"shards": f"{digits}/train-*.tar", "image_size": 8, "global_batch": 48}
    whole = [batch.keys for batch in stream(**given).slice(35)]
    ranks = [[batch.keys for batch in stream(**given, start=31, rank=rank, world_size=2).slice(4)] for rank in range(2)]
    assert [one + other for one, other in zip(*ranks, strict=True)] == whole[31:]
    assert sum(len(batch.keys) for batch in stream(**given, train=False)) == 1442


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_of_a_stream_are_one_line(tmp_path, workers):
    before = set(multiprocessing.active_children())
    write_tar(tmp_path / "s.tar", {f"{i}.{kind}": one for i in range(8) for kind, one in (("png", b"words"), ("cls", b"1"))})
    with pytest.raises(InputError, match=r"s\.tar: sample \d at byte \d+: .*: no image of a batch of 4 can be used") as error:
        next(iter(stream(f"{tmp_path}/s.tar", image_size=8, global_batch=4, workers=workers)))
    assert "\n" not in str(error.value)
    # The traceback holds the stream: its loaders end with it, and what they inherited, such as a browser's pipes, is closed.
    del error
    gc.collect()
    assert set(multiprocessing.active_children()) <= before
