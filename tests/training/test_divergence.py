"""Divergence ends a run with one line that names phase, step, what and what to try."""

import math

import pytest
import torch
from faulty import records, refused

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.distributed.context import Context
from dnal_dist.training import divergence, setup


@pytest.fixture
def run(folder):
    shards = [f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar", f"output={folder}/run", "tracking.tracker=none"]
    found = setup.prepare(recipe.load("recipes/digits.yaml", [*shards, "data.global_batch=8"]), Context())
    found.state.phase, found.state.step, found.state.global_step = "search", 7, 9
    yield found
    found.log.close()
    found.close()


def spoiled(run, trained, what: str) -> None:
    parameter = next(iter(trained.parameters.values()))
    target = {
        "the weights": parameter,
        "their momentum": trained.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter)),
        "BatchNorm's statistics": next(b for name, b in trained.module.named_buffers() if name.endswith("running_var")),
        "alpha": run.architecture.alpha,
        "alpha's momentum": run.architecture_optimizer.state[run.architecture.alpha].setdefault("momentum_buffer", torch.zeros(9)),
    }[what]
    with torch.no_grad():
        target.view(-1)[-1] = math.nan


@pytest.mark.parametrize("what", divergence.WATCHED)
def test_each_value_that_training_moves_is_watched(run, what):
    trained = run.context.wrap(run.network, run.recipe.phases.search.optimizer, {}, run.recipe.training)
    assert not divergence.flags(run, trained).any()
    spoiled(run, trained, what)
    flags = divergence.flags(run, trained)
    with pytest.raises(InputError, match=rf"^diverged in search after 7 steps: {what} not finite; lower phases\.search\.optimizer"):
        divergence.check(run, flags)


def test_an_absurd_loss_is_divergence(run):
    divergence.check(run, [], 900.0, divergence.HIGHEST_LOSS)
    for loss in (2e27, math.inf, math.nan):
        with pytest.raises(
            InputError, match=rf"search after 7 steps: the loss is {loss:.3g}(?!.*not finite).*clip_norm".replace("+", r"\+")
        ):
            divergence.check(run, [], loss, divergence.HIGHEST_LOSS)


def test_a_strange_loss_is_a_warning_that_names_both(run):
    run.state.phase = "finetune"
    assert divergence.warning(run, 20.0) == ""
    message = "the training loss in finetune after 7 steps is 812, that of a guess is 2.30; if it stays so, lower phases.finetune."
    assert divergence.warning(run, 812.0).startswith(message)


def test_a_strange_loss_is_reported_once_in_a_phase(train, folder):
    train("phases.pretrain.steps=12", "phases.pretrain.optimizer.lr=3")
    message = [one["message"] for one in records(folder, "warning") if "of a guess" in one["message"]]
    assert message and len({one.partition(" after ")[0] for one in message}) == len(message)


def test_a_rate_far_too_high_ends_the_command_in_one_line(train):
    refused(train("phases.search.optimizer.lr=500", "phases.search.steps=60"), r"diverged in search after \d+ steps: .*lr \(500\)")
