"""Every recipe that ships loads, builds, and takes a step of each phase."""

from pathlib import Path

import pytest

from dnal_dist import nets, phases, recipe, report, train
from dnal_dist.parallel import Parallel

RECIPES = sorted(Path("recipes").glob("*.yaml"))
ONE_STEP = [
    "phases.pretrain.steps=1",
    "phases.search.steps=2",
    "phases.finetune.steps=1",
    "tracking.tracker=none",
    "data.workers=0",
]


def test_there_are_recipes():
    assert Path("recipes/digits.yaml") in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_a_step_of_each_phase(path, digits, tmp_path):
    changes = [
        *ONE_STEP,
        f"output={tmp_path}",
        f"data.train={digits}/train-*.tar",
        f"data.val={digits}/val-*.tar",
        "data.global_batch=8",
    ]
    settings = recipe.load(path, changes)
    run = train.assemble(settings, Parallel())
    phases.go(run)
    assert (run.phase, run.global_step) == ("done", 4)
    assert set(report.summary(tmp_path)["accuracy"]) == {"pretrain", "search", "prune", "finetune"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_begins_with_a_comment_that_gives_its_command(path):
    head = path.read_text().split("\nname:")[0]
    assert head.startswith("#") and f"recipes/{path.name}" in head


def test_every_small_network_trains_by_the_demos_recipe(digits, tmp_path):
    for name in set(nets.NETWORKS) & {"vgg_digits", "resnet_digits"}:
        folder = tmp_path / name
        shards = [f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar"]
        run = train.assemble(
            recipe.load("recipes/digits.yaml", [*ONE_STEP, *shards, f"model.name={name}", f"output={folder}"]), Parallel()
        )
        phases.go(run)
        assert (folder / "compact" / "weights.safetensors").exists()
