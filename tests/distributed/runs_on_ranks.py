"""Jobs that train whole runs. Wherever a network is evaluated or saved, all processes must have the same one, bit for bit: weights,
running statistics and alpha."""

import gc

import pytest

from dnal_dist import recipe
from dnal_dist.distributed.context import Context
from dnal_dist.report import outputs
from dnal_dist.training import exit, loop, phases, setup, state


def agreeing(function, run_of):
    def call(*arguments):
        run = run_of(*arguments)
        run.context.agree("the network", run.network.state_dict())
        run.context.agree("alpha", {"alpha": run.architecture.alpha})
        return function(*arguments)

    return call


def train(context: Context, path: str, *overrides: str) -> None:
    """The recipe at `path` from its beginning to its end, without the report: drawing it takes as long as a short run."""
    run = setup.prepare(recipe.load(path, overrides), context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", agreeing(loop.evaluate, lambda *_: run))
        patch.setattr(state, "save", agreeing(state.save, lambda run, *_: run))
        patch.setattr(outputs, "write_all", lambda *_, **__: None)
        phases.train(run)
        assert run.state.phase == "done", run.state.phase
        exit.finish(run)
    run.close()


def train_each(context: Context, runs: list[list[str]]) -> None:
    """One run after the other: of each the recipe's path and the overrides."""
    # Each phase collects garbage, and would search through all that the modules hold.
    gc.collect()
    gc.freeze()
    for path, *overrides in runs:
        train(context, path, *overrides)
    gc.unfreeze()
