"""Processes stay in step whatever each of them has to skip, with parts of a batch that synchronise once."""

import json

import pytest
from faulty import png, write_tar

from dnal_dist.data.order import GlobalOrder
from dnal_dist.data.shards import Shards
from dnal_dist.recipe import Data

pytestmark = pytest.mark.timeout(1000)

SHORT = (
    "phases.pretrain.steps=4",
    "phases.search.steps=4",
    "phases.finetune.steps=4",
    "tracking.tracker=none",
    "tracking.plots=false",
    "architecture.recalibration_batches=2",
    "tracking.log_every=1",
)


def members(bad: set[int]) -> dict[str, bytes]:
    pairs = ((f"{i:02}", b"" if i in bad else png(3 * i), str(i % 10).encode()) for i in range(64))
    return {name: content for key, image, label in pairs for name, content in ((f"{key}.png", image), (f"{key}.cls", label))}


@pytest.mark.parametrize(("backend", "lost"), [("fsdp2", 7), ("zero3", 2)])
def test_ranks_stay_in_step_when_one_loses_samples(ranks, tmp_path, backend, lost):
    """Of the 8 images that process 0 takes of the second batch, in parts of 2, `lost` cannot be used."""
    write_tar(tmp_path / "train-0.tar", members(set()))
    write_tar(tmp_path / "val-0.tar", members(set(range(16, 64))))
    data = Data(train=f"{tmp_path}/train-0.tar", val="-", image_size=8, global_batch=16)
    order = GlobalOrder(Shards(data.train, "data.train", 10), data, 0, True).epoch(0)
    bad = {int(index) for index in order[16 : 16 + lost]}
    write_tar(tmp_path / "train-0.tar", members(bad))
    given = (f"data.train={tmp_path}/train-0.tar", f"data.val={tmp_path}/val-0.tar", f"output={tmp_path}/run", "seed=0")
    given += ("data.global_batch=16", "data.per_device_batch_limit=2", "data.max_bad_fraction=1", *SHORT)
    ranks.run(backend, 2, "runs_on_ranks:train", "recipes/digits.yaml", *given)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    receipts = [record for record in records if record["kind"] == "receipt"]
    assert [(one["samples"], len(one["skipped"])) for one in receipts] == [(64 - lost, lost)] * 3
    assert all(0 <= record["accuracy"] <= 1 for record in records if record["kind"] == "train")
