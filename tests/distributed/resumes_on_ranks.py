"""Jobs of test_resumes: runs that are stopped after given steps."""

import pytest

from dnal_dist import recipe
from dnal_dist.distributed.context import Context
from dnal_dist.training import phases, setup, state
from dnal_dist.training.stopping import Stopped, StopPoll

# In the middle of each phase; in the search its alphas have momentum then.
STOPS = (2, 9, 15)


class StoppingPoll(StopPoll):
    """Stops after the given iterations of the run, and no evaluation."""

    def __init__(self, context, stops):
        super().__init__(context)
        self.stops, self.run = stops, None

    def poll(self, *of_a_step):
        if of_a_step and self.run.state.global_step in self.stops:
            raise Stopped("by the test")
        return super().poll(*of_a_step)


def go(context: Context, folder, changes, stops=()) -> bool:
    """Begin the run in `folder`, or resume it. Returns whether it reached its end."""
    settings = recipe.load("recipes/digits.yaml", [*changes, f"output={folder}"])
    poll = StoppingPoll(context, stops)
    poll.run = run = setup.prepare(settings, context, poll)
    try:
        phases.train(run)
        ended = True
    except Stopped:
        ended = False
    assert run.writer.finish()
    if ended:
        run.log.global_step = run.state.global_step
        run.log.record("end", images=run.state.global_step * settings.data.global_batch)
    run.log.close()
    run.close()
    context.wait()
    return ended


def every(context: Context, folder: str, changes: list[str]) -> None:
    """A run that never saves, and one that is stopped after the steps of STOPS and resumes, into `folder`/{never,stopped}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "save", lambda run, *_: state.merge_receipts(run))
        assert go(context, f"{folder}/never", changes)
    for number in range(len(STOPS)):
        assert not go(context, f"{folder}/stopped", changes, STOPS[number:])
    assert go(context, f"{folder}/stopped", changes)


def until(context: Context, step: int, folder: str, changes: list[str]) -> None:
    """A run in `folder` that stops after `step`; 0: never."""
    ended = go(context, folder, changes, (step,))
    assert ended == (step == 0)
