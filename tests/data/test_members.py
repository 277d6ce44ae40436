"""Which members of a sample are its image and its label, and what is said where the recipe must name them."""

import io
import tarfile
from itertools import pairwise

import numpy as np
import pytest
from faulty import png, write_tar
from PIL import Image

from data_tools.survey import Surveyor
from dnal_dist.common.errors import InputError
from dnal_dist.data.classes import refuse_conflicts
from dnal_dist.data.pipeline import stream
from dnal_dist.data.samples import MOST_BYTES, Fault, SampleFormat, parse
from dnal_dist.data.shards import Shards
from dnal_dist.data.tar import BLOCK, boundaries
from dnal_dist.recipe import Data


def data(**named) -> Data:
    return Data(train="t", val="v", image_size=8, global_batch=1, **named)


def crops(count: int = 6) -> dict[str, bytes]:
    members = {}
    for i in range(count):
        key = f"scan{i:04}"
        members |= {f"{key}.png": png(1), f"{key}.cls": b"1", f"{key}.crop2.png": png(2), f"{key}.crop2.cls": b"2"}
    return members


def test_a_second_image_and_label_in_a_sample_are_refused_until_the_recipe_names_one(tmp_path):
    write_tar(tmp_path / "s.tar", crops())
    with pytest.raises(InputError, match=r"s\.tar: sample scan0000 .* found 2 and 2; .*'data\.image'.*'data\.label'.*in 6 of 6"):
        Shards(f"{tmp_path}/s.tar", "data.train", 10)
    for named, grey, label in (({"image": "png", "label": "cls"}, 1, 1), ({"image": "crop2.png", "label": "CROP2.cls"}, 2, 2)):
        shards = Shards(f"{tmp_path}/s.tar", "data.train", 10, data(**named))
        assert shards.samples == 6 and shards[5].label == label
        assert np.unique(np.asarray(Image.open(io.BytesIO(shards[5].image)))).tolist() == [grey]
        assert "members without a reader" in shards.notes[0]


def test_a_second_image_in_a_few_samples_costs_these_alone(tmp_path):
    members = {f"{i}.{kind}": one for i in range(9) for kind, one in (("png", png()), ("cls", b"1"))}
    write_tar(tmp_path / "s.tar", members | {"8.mask.png": png()})
    shards = Shards(f"{tmp_path}/s.tar", "data.train", 10)
    assert shards[7].label == 1
    with pytest.raises(Fault, match=r"found 2 and 1; of \.mask\.png, \.png name one by key 'data\.image'"):
        shards[8]


def test_names_whose_dots_make_one_sample_of_all_are_refused(tmp_path):
    write_tar(tmp_path / "s.tar", {f"img.{i}.{kind}": one for i in range(9) for kind, one in (("png", png()), ("cls", b"1"))})
    with pytest.raises(InputError, match=r"found 9 and 9; .* and 5 more .*rename the files: a key ends at the first dot"):
        stream(f"{tmp_path}/s.tar", image_size=8, global_batch=4)


def test_a_file_of_any_size_that_is_no_shard_is_named_so(tmp_path):
    """What lies beyond the largest image is not read for that."""
    content = b"".join(
        header.tobuf() + body.ljust(-(-len(body) // BLOCK) * BLOCK, b"\0")
        for header, body in (
            (member(f"img.{i}.{kind}", len(one)), one) for i in range(3) for kind, one in (("png", png()), ("cls", b"1"))
        )
    )
    with (tmp_path / "s.tar").open("wb") as file:
        file.write(content + member("img.3.png", MOST_BYTES).tobuf())
        file.truncate(len(content) + BLOCK + MOST_BYTES + 2 * BLOCK)
    with pytest.raises(
        InputError, match=r"sample img at byte 0: .* found 3 and 3; .*rename the files: a key ends at the first dot"
    ):
        stream(f"{tmp_path}/s.tar", image_size=8, global_batch=4)
    found = Surveyor({tmp_path: SampleFormat()})(tmp_path / "s.tar", lambda _: None)
    assert len(found.faults) == 1 and "rename the files" in found.faults[0][1]
    with (tmp_path / "s.tar").open("wb") as file:
        file.write(member("a.png", MOST_BYTES).tobuf())
        file.truncate(BLOCK + MOST_BYTES + 2 * BLOCK)
    with pytest.raises(Fault, match=rf"sample a at byte 0: it takes {MOST_BYTES + BLOCK} bytes, more than any image"):
        Shards(f"{tmp_path}/s.tar", "data.train", 10)[0]


def member(name: str, size: int) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.size = size
    return found


def test_members_that_are_no_neighbours_name_the_remedy(tmp_path):
    write_tar(tmp_path / "s.tar", {f"{i}.{kind}": one for kind, one in (("png", png()), ("cls", b"1")) for i in range(9)})
    with pytest.raises(Fault, match=r"found 1 and 0; the members of a sample must be neighbours in the tar \(tar --sort=name\)"):
        Shards(f"{tmp_path}/s.tar", "data.train", 10)[0]


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf7\r\n", "7".encode("utf-16"), b" 7 "])
def test_a_byte_order_mark_before_a_label_is_passed_over(text):
    assert SampleFormat(10).read(text) == 7


def test_captions_beside_a_label_are_left_alone(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.png": png(), "a.cls": b"3", "a.txt": b"A dog.", "a.en.txt": b"A dog.", "a.x.json": b"{}"})
    assert Shards(f"{tmp_path}/s.tar", "data.train", 10)[0].label == 3


@pytest.mark.parametrize(
    "magic, tool", [(b"\x1f\x8b", "gunzip"), (b"BZh91", "bunzip2"), (b"\xfd7zXZ\0", "unxz"), (b"(\xb5/\xfd", "unzstd")]
)
def test_a_compressed_shard_is_called_so(tmp_path, magic, tool):
    (tmp_path / "s.tar").write_bytes(magic + bytes(range(256)) * 8)
    with pytest.raises(InputError, match=rf"s\.tar: it is compressed; {tool} it"):
        Shards(f"{tmp_path}/s.tar", "data.train", 10)


def test_a_header_that_no_reader_takes_costs_its_sample_alone(tmp_path):
    """A size of 5 000 digits is a ValueError in tarfile, and one of 4 GB would be read as a header."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(9):
            for kind, content in (("png", png()), ("cls", b"1")):
                member = tarfile.TarInfo(f"{i}.{kind}")
                member.size = len(content)
                member.pax_headers = {"size": "9" * 5000} if (i, kind) == (4, "png") else {}
                tar.addfile(member, io.BytesIO(content))
    offsets, damage = boundaries(file)
    chunks = [file.getvalue()[begin:end] for begin, end in pairwise(offsets)]
    (tmp_path / "s.tar").write_bytes(file.getvalue())
    shards = Shards(f"{tmp_path}/s.tar", "data.train", 10)
    assert len(chunks) == shards.samples == 9 and len(damage) == 1
    for i, chunk in enumerate(chunks):
        if i == 4:
            with pytest.raises(Fault, match=rf"s\.tar: sample .* at byte {offsets[4]}: its tar header is damaged"):
                shards[4]
        else:
            assert parse(chunk).key == str(i)


# --- patterns


def shards_in(*paths) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tar(path, {"a.png": png(), "a.cls": b"1"})


def test_two_asterisks_take_any_number_of_folders(tmp_path):
    shards_in(tmp_path / "s-0.tar", tmp_path / "a" / "s-1.tar", tmp_path / "a" / "b" / "s-2.tar")
    assert Shards(f"{tmp_path}/**/s-*.tar", "data.train", 10).samples == 3
    assert Shards(f"{tmp_path}/*/s-*.tar", "data.train", 10).samples == 1
    for glued in ("**.tar", "a**/*.tar"):
        with pytest.raises(InputError, match=r"key 'data\.train': .*: \*\* stands alone between slashes"):
            Shards(f"{tmp_path}/{glued}", "data.train", 10)


def test_brackets_that_match_nothing_stand_for_themselves(tmp_path):
    shards_in(tmp_path / "[2024]" / "s-0.tar", tmp_path / "[2024]" / "s-1.tar")
    assert Shards(f"{tmp_path}/[2024]/s-*.tar", "data.train", 10).samples == 2
    assert Shards(f"{tmp_path}/[2024]/s-1.tar", "data.train", 10).samples == 1
    assert Shards(f"{tmp_path}/?2024?/s-[1].tar", "data.train", 10).samples == 1
    with pytest.raises(InputError, match=r"no shard matches .*\[2025\].*\[ and \] are a wildcard for one character"):
        Shards(f"{tmp_path}/[2025]/s-*.tar", "data.train", 10)


# --- classes


def test_indices_that_number_the_classes_differently_are_refused():
    names = {"train/index.json": ["cat", "dog"], "val/index.json": ["dog", "cat"]}
    with pytest.raises(InputError, match=r"val/index\.json: calls class 0 'dog', train/index\.json calls it 'cat'; a class has"):
        refuse_conflicts(names)
    with pytest.raises(InputError, match=r"names 3 classes, train/index\.json names 2"):
        refuse_conflicts(names | {"val/index.json": ["cat", "dog", "eel"]})
    refuse_conflicts({"a": ["cat", "dog"], "b": ["0", "1"], "c": ["cat", "dog"]})
    refuse_conflicts({})


def test_digits_as_names_may_conflict_with_numbers():
    numbers = ["0", "1", "10", "2"]  # as a folder is sorted
    with pytest.raises(InputError, match="calls class 2 '10', train calls it '2'"):
        refuse_conflicts({"train": ["0", "1", "2", "3"], "val": numbers})
    with pytest.raises(InputError, match="calls class 2 'x', train calls it '2'"):
        refuse_conflicts({"train": ["0", "1", "2"], "val": ["0", "1", "x"]})
    refuse_conflicts({"train": numbers, "val": numbers, "test": []})
    refuse_conflicts({"train": ["0", "1", "2"], "val": ["0", "1", "2"]})
