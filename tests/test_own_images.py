"""docs/own-images.md, command by command, on images drawn for it: from a folder of images to compact networks."""

import importlib
import json
import shlex
from pathlib import Path

import pytest
from in_process import called
from PIL import Image, ImageDraw
from test_docs import FENCE, door_and_arguments, logical_lines

from dnal_dist import recipe
from dnal_dist.recipe.draft import draft
from dnal_dist.report import outputs

PAGE = Path("docs/own-images.md")
# Images, network and iterations that take a second; everything else is as the page says.
SMALL = {"timm:mobilenetv3_large_100": "vgg_digits"}
QUICK = (
    "data.workers=0", "data.global_batch=8", "tracking.plots=false", "tracking.log_every=4", "architecture.recalibration_batches=1",
    "phases.pretrain.schedule.warmup=0", "phases.search.steps=8", "phases.finetune.steps=4",
)  # fmt: skip
MORE = {"make_shards": ["--workers", "1"], "verify": ["--workers", "1"], "recipe": ["--image-size", "8"]}
# Long by themselves; tests/doctor and tests/export run them.
ELSEWHERE = ("doctor", "evaluate", "export", "predict")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with images of two classes, which is the working directory."""
    for name, drawn in (("cat", "ellipse"), ("dog", "rectangle")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            image = Image.new("RGB", (12, 10), (number * 9, 90, 120))
            getattr(ImageDraw.Draw(image), drawn)((2, 2, 6 + number % 4, 7), fill=(250, 250 - number, 20))
            image.save(tmp_path / "images" / name / f"{number}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_leads_from_a_folder_of_images_to_compact_networks(folder, capsys, monkeypatch):
    monkeypatch.setattr(outputs, "write_all", lambda *_, **__: None)  # a report is half of such a run
    page = Path(__file__).parents[1] / PAGE
    lines = [line for language, block in FENCE.findall(page.read_text()) if language == "sh" for line in logical_lines(block)]
    said = {}
    for line in lines:
        if (found := door_and_arguments(shlex.split(line))) is None:
            assert line.startswith("pip "), line
            continue
        door, arguments = found[0], [SMALL.get(word, word) for word in found[1]]
        name = door.rpartition(".")[2]
        if name in ELSEWHERE:
            continue
        if name == "train":
            length = () if "phases.pretrain.epochs=0" in arguments else ("phases.pretrain.steps=4",)
            arguments += [*QUICK, *length]
        module = importlib.import_module(door)
        module = importlib.import_module(f"{door}.__main__") if hasattr(module, "__path__") else module
        ended = called(module.main, capsys, *arguments, *MORE.get(name, ()))
        assert ended.code in ((0, 3) if name == "train" else (0,)), (line, ended)
        said[name] = ended.out
    assert "cat           18          2" in said["make_shards"] and "mean: [" in said["verify"]
    networks = [Path("runs") / name / "compact" / "weights.safetensors" for name in ("own", "smaller")]
    assert all(path.exists() for path in (*networks, Path("sheet.png")))


def index(folder: Path, train: int, classes: int = 10) -> Path:
    folder.mkdir()
    shards = [{"file": f"{split}-000000.tar", "samples": count} for split, count in (("train", train), ("val", 50))]
    (folder / "index.json").write_text(json.dumps({"classes": list("abcdefghij")[:classes], "shards": shards}))
    return folder


@pytest.mark.parametrize(
    "model, published, size",
    [
        ("timm:mobilenetv3_large_100", "timm:mobilenetv3_large_100", 224),
        ("resnet50_imagenet", "torchvision:resnet50", 224),
        ("vgg16_cifar", None, 32),
    ],
)
def test_a_first_recipe_is_valid_and_begins_with_published_weights(tmp_path, model, published, size):
    for train in (9, 3000, 1_200_000):
        data = index(tmp_path / f"its images {train}", train)
        (tmp_path / "own.yaml").write_text(draft("own", data, model, "0.3x"))
        found = recipe.load(tmp_path / "own.yaml")
        assert found.model.init_from == published and found.data.image_size == size and found.model.num_classes == 10
        assert found.data.global_batch <= train and str(data) in found.data.train
    (tmp_path / "own.yaml").write_text(draft("own", data, model, "2M", 64, scratch=True))
    scratch = recipe.load(tmp_path / "own.yaml")
    assert scratch.model.init_from is None and scratch.data.image_size == 64
