"""docs/deploy.md: its blocks run where this project cannot be imported. And `predict`."""

import io
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from in_process import called
from PIL import Image

from dnal_dist import predict, recipe
from dnal_dist.export.images import data_of, preprocessed, preprocessing

BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```$", Path("docs/deploy.md").read_text())
TORCH = ("model", "torch", "torchgen", "safetensors", "typing_extensions", "packaging")
# What torch itself requires.
WITH_TORCH = ("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy")
PACKAGES = {
    "from model": TORCH,
    "model.pt2": (*TORCH, *WITH_TORCH),
    "model.onnx": ("onnxruntime", "flatbuffers"),
    "model.xml": ("openvino", "openvino_telemetry", "packaging"),
}


def encoded(width: int, height: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(width * height)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    smooth.convert(mode).save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize("words", PACKAGES)
def test_the_blocks_run_without_this_project(words, exported, clean_room, tmp_path):
    folder = shutil.copytree(exported / "export", tmp_path / "export")
    if words == "model.xml":
        openvino = pytest.importorskip("openvino")
        openvino.save_model(openvino.convert_model(folder / "model.onnx"), folder / "model.xml", compress_to_fp16=False)
    prepare, (block,) = BLOCKS[0], [block for block in BLOCKS[1:] if words in block]
    (folder / "image.png").write_bytes(encoded(13, 9))
    where = f"import os, sys\nos.chdir({str(folder)!r})\nsys.path.insert(0, '.')\n"
    out = clean_room(where + prepare + block, "numpy", "PIL", *PACKAGES[words])
    assert re.fullmatch(r"\d\n", out)


@pytest.mark.parametrize("resize", [None, 40])
@pytest.mark.parametrize(
    "image", [(32, 32), (50, 33), (31, 77), (32, 41, "JPEG"), (200, 120, "JPEG"), (47, 45, "JPEG", "L"), (60, 70, "PNG", "P")]
)
def test_preprocessing_is_the_evaluation_transform(image, resize, tmp_path, monkeypatch):
    """That of the block of docs/deploy.md."""
    data = recipe.Data(train="none", val="none", image_size=32, resize=resize, global_batch=1)
    content = encoded(*image)
    assert (
        np.abs(by_the_block(content, preprocessing(data, [], 10), tmp_path, monkeypatch) - preprocessed(content, data)).max()
        <= 1e-6
    )


def by_the_block(content: bytes, how: dict, folder: Path, monkeypatch) -> np.ndarray:
    (folder / "image.png").write_bytes(content)
    (folder / "preprocessing.json").write_text(json.dumps(how))
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(BLOCKS[0], "docs/deploy.md", "exec"), names)
    return names["images"]


@pytest.mark.parametrize("exif", [False, True])
def test_transparent_images_lie_on_the_recipe_s_background_and_are_turned(exif, tmp_path, monkeypatch):
    """By `predict` as by the block of docs/deploy.md."""
    data = recipe.Data(train="none", val="none", image_size=8, global_batch=1, background=(10, 20, 30), exif=exif)
    how, content = preprocessing(data, [], 10), io.BytesIO()
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 255, 0, 255), (0, 0, 8, 2))
    orientation = Image.Exif()
    orientation[274] = 3
    image.save(content, "PNG", exif=orientation)
    found = preprocessed(content.getvalue(), data_of(how))
    pixels = (found[0].transpose(1, 2, 0) * data.std + data.mean) * 255
    assert np.allclose(pixels[4, 4], (10, 20, 30), atol=1e-3) and np.allclose(pixels[7 if exif else 0, 0], (0, 255, 0), atol=1e-3)
    assert np.abs(by_the_block(content.getvalue(), how, tmp_path, monkeypatch) - found).max() <= 1e-6


def test_images_are_predicted_by_each_runtime(exported, tmp_path, capsys):
    (tmp_path / "one.png").write_bytes(encoded(8, 8))
    found = {}
    for runtime in ("onnx", "pt2", "torch"):
        code, out, _ = called(predict.main, capsys, exported, tmp_path / "one.png", "--runtime", runtime, "--json")
        assert code == 0
        ((one,), classes) = (json.loads(out), json.loads(out)[0]["classes"])
        assert one["image"] == str(tmp_path / "one.png") and len(classes) == 5
        found[runtime] = [(row["class"], pytest.approx(row["probability"], abs=1e-5)) for row in classes]
        assert all(a["probability"] >= b["probability"] for a, b in itertools.pairwise(classes))
    assert found["onnx"] == found["pt2"] == found["torch"]


def test_what_is_no_image_is_named_and_the_others_are_predicted(exported, tmp_path, capsys):
    (tmp_path / "one.png").write_bytes(encoded(8, 8))
    (tmp_path / "two.png").write_bytes(b"none")
    code, out, err = called(predict.main, capsys, exported / "export", tmp_path / "two.png", tmp_path / "one.png")
    assert code == 2 and err == "error: 1 of 2 images cannot be read\n"
    assert "two.png: it is no image" in out and re.search(r"one\.png: \d [\d.]+ %", out)


def test_a_folder_that_is_no_export_is_refused(tmp_path, capsys):
    code, _, err = called(predict.main, capsys, tmp_path, tmp_path / "one.png")
    assert code == 2 and "preprocessing.json: no such file" in err


@pytest.mark.parametrize("content", ["[1]", "{}", '{"image_size": 1e9}', "\0", "[" * 100_000])
def test_hostile_preprocessing_is_refused(content, exported, tmp_path, capsys):
    (tmp_path / "preprocessing.json").write_text(content)
    (tmp_path / "model.onnx").write_bytes(b"")
    code, _, err = called(predict.main, capsys, tmp_path, tmp_path / "one.png")
    assert code == 2 and "not the preprocessing of an export" in err and err.count("\n") == 1


def test_neither_a_pickle_nor_a_program_runs_unasked(exported, tmp_path, capsys):
    (tmp_path / "preprocessing.json").write_text((exported / "export" / "preprocessing.json").read_text())
    (tmp_path / "model.py").write_text("raise SystemExit('it ran')")
    (tmp_path / "model.pt2").write_bytes(b"")
    code, _, err = called(predict.main, capsys, tmp_path, tmp_path / "one.png")
    assert code == 2 and "no model.onnx or model.xml that can be run" in err
