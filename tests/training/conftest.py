"""Fixtures of the tests of training."""

import pytest
from faulty import FEW

from dnal_dist import recipe
from dnal_dist.distributed.context import Context
from dnal_dist.training import phases, setup


@pytest.fixture(scope="session")
def source(digits, tmp_path_factory):
    """A run that stands where its search begins, and its network."""
    folder = tmp_path_factory.mktemp("source") / "run"
    shards = [f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", f"output={folder}"]
    run = setup.prepare(recipe.load("recipes/digits.yaml", [*shards, *FEW, "phases.pretrain.steps=20"]), Context())
    batches = phases.training_batches(run)
    phases.pretrain(run, batches)
    batches.close()
    run.log.close()
    run.close()
    return folder, {name: tensor.clone() for name, tensor in run.supernet.state_dict().items()}
