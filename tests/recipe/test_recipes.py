"""Every recipe that ships goes through its phases, on images in the format of its own data set."""

from pathlib import Path

import pytest
import sources
import torch

from data_tools import cifar10, fashion_mnist, make_shards
from dnal_dist import recipe
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.nets import compact
from dnal_dist.report import published, records

# All of them are run by the first test that asks for one.
pytestmark = pytest.mark.timeout(1000)

RECIPES = sorted(Path("recipes").glob("*.yaml"))
FEW_STEPS = [
    "phases.pretrain.steps=2",
    "phases.search.steps=4",
    "phases.finetune.steps=2",
    "tracking.tracker=none",
    "tracking.plots=false",
    "architecture.recalibration_batches=2",
    "data.workers=0",
]
# Images of 32 pixels, which all networks can take, and a quarter of the channels of all but the small ones: tests/nets builds
# them whole.
SMALLER = {"data/imagenet": ["data.image_size=32", "data.resize=36"]}
NARROW = ["model.width=0.25"]


def test_the_papers_recipes_are_among_them():
    assert {recipe.load(path).model.name for path in RECIPES} >= {"vgg_digits", *published.tables()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory, digits):
    """Folders of shards by the folder that recipes name, made from small sources in the formats of the true ones."""
    root = tmp_path_factory.mktemp("shards")
    folders = {"data/digits": digits} | {f"data/{kind}": root / kind for kind in ("fashion_mnist", "cifar10", "imagenet")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    sources.fashion_mnist(root / "idx")
    sources.cifar10(root / "cifar-10-batches-bin")
    sources.imagenet(root / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "FILES", sources.FASHION_MNIST)
        patch.setattr(cifar10, "RECORDS", sources.CIFAR10_RECORDS)
        make_shards.fashion_mnist(folders["data/fashion_mnist"], root / "idx")
        make_shards.cifar10(sources.archived(root / "cifar-10-batches-bin"), folders["data/cifar10"])
        make_shards.image_folder(root / "images", folders["data/imagenet"])
    return folders


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shards, ranks):
    """The run folder of every recipe by its name: all of them run, one after the other."""
    root = tmp_path_factory.mktemp("runs")
    runs = {path.stem: [str(path), *_changes(path, shards), f"output={root / path.stem}"] for path in RECIPES}
    ranks.run("single", 1, "runs_on_ranks:train_each", list(runs.values()))
    return {name: root / name for name in runs}


def _changes(path: Path, shards: dict[str, Path]) -> list[str]:
    """Overrides that put the recipe on its small data set and make it short."""
    settings = recipe.load(path)
    source = settings.data.train.rpartition("/")[0]
    assert source in shards, f"{path}: this test makes no shards like those of {source}"
    assert (settings.data.train, settings.data.val) == (f"{source}/train-*.tar", f"{source}/val-*.tar")
    changes = [*FEW_STEPS, "data.global_batch=8", *SMALLER.get(source, []), *([] if source == "data/digits" else NARROW)]
    return [*changes, f"data.train={shards[source]}/train-*.tar", f"data.val={shards[source]}/val-*.tar"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_goes_through_its_phases(path, finished):
    folder = finished[path.stem]
    run, shipped = records.load(folder), recipe.load(path)
    assert run.last("start")["name"] == shipped.name
    _, saved, damaged = checkpoint.latest(folder / "checkpoints")
    assert (saved.state.phase, saved.state.global_step, damaged) == ("done", 8, {})
    assert list(records.summary(folder)["accuracy"]) == ["pretrain", "search", "prune", "finetune"]
    assert [r["phase"] for r in run.of("phase")] == ["pretrain", "search", "prune", "finetune"]
    assert all(0 <= r["accuracy"] <= r["top5"] <= 1 for r in run.of("eval"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_leaves_a_smaller_network_and_its_cost_by_both_rules(path, finished):
    folder = finished[path.stem]
    settings, pruned = recipe.load(folder / "recipe.yaml"), records.load(folder).last("prune")
    for rule in ("exact", "paper"):
        for what in ("macs", "params"):
            assert 0 < pruned["compact"][rule][what] < pruned["full"][rule][what]
    small = compact.load(folder / "compact")
    assert sum(p.numel() for p in small.parameters()) == pruned["compact"]["exact"]["params"]
    size = settings.data.image_size
    with torch.no_grad():
        found = small.eval()(torch.randn(3, 3, size, size))
    assert found.shape == (3, settings.model.num_classes) and found.isfinite().all()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_begins_with_a_comment_that_gives_its_command(path):
    head = path.read_text().split("\nname:")[0]
    assert head.startswith("#") and f"recipes/{path.name}" in head
