"""A recipe without a search: the compact network of a finished run is finetuned on."""

import pytest
import torch
from runs import SHORT, Killed, arguments, at, killed, records, tensors

from dnal_dist.nets import compact
from dnal_dist.report import records as reported

ALONE = ("phases.pretrain.epochs=0", "phases.search.epochs=0")


@pytest.fixture
def alone(train_here, digits, finished, tmp_path):
    def run(*changes: str, source=finished, output="next"):
        first = arguments(digits, tmp_path / output, *SHORT, *ALONE)
        return train_here(*first, f"model.init_from={source}", *changes)

    return run


def test_it_begins_with_the_compact_network_as_it_was(alone, finished, tmp_path):
    assert alone("phases.finetune.optimizer.lr=0.001").code == 0
    run = tmp_path / "next"
    before, after = (reported.summary(folder) for folder in (finished, run))
    assert after["accuracy"].keys() == {"prune", "finetune"}
    assert after["accuracy"]["prune"] == pytest.approx(before["accuracy"]["finetune"], abs=1e-6)
    assert (after["compact"], after["full"], after["channels"]) == (before["compact"], before["full"], before["channels"])
    assert compact.describe(compact.load(run / "compact")) == compact.describe(compact.load(finished / "compact"))
    assert tensors(run) != tensors(finished)


def test_a_killed_one_resumes(alone, finished, tmp_path):
    assert alone(output="whole").code == 0
    with pytest.raises(Killed), at("prune", before=killed(0)):
        alone()
    assert alone().code == 0 and tensors(tmp_path / "next") == tensors(tmp_path / "whole")


def test_another_number_of_classes_gets_a_last_layer_of_its_own(alone, tmp_path, finished):
    ended = alone("model.num_classes=12", source=finished / "compact")
    assert ended.code == 0 and "begins with random weights" in ended.out.replace("\n", " ")
    assert compact.load(tmp_path / "next" / "compact")(torch.zeros(1, 3, 8, 8)).shape == (1, 12)


def test_a_compact_network_by_name_keeps_all_that_it_has(train_here, digits, finished, tmp_path):
    words = arguments(digits, tmp_path / "next", *SHORT, *ALONE, f"model.name=compact:{finished}")
    assert train_here(*words).code == 0
    (pruned,) = records(tmp_path / "next", "prune")
    assert pruned["compact"] == pruned["full"] and "threshold" not in pruned


WRONG = {
    "phases.search has no iterations, so a compact network is needed": ("model.init_from=null",),
    "without a search only a compact network is finetuned": ("phases.pretrain.steps=1",),
    "key 'model.width': 2.0 here, 1.0 in": ("model.width=2.0",),
    "holds no pruned network; phases.search has no iterations": (f"model.init_from={__file__}",),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_finetuned_is_refused(message, alone, tmp_path):
    ended = alone(*WRONG[message])
    assert ended.code == 2 and message in ended.err and not (tmp_path / "next").exists()
