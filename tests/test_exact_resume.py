"""A run that is stopped or killed wherever it stands, and goes on, is bit for bit the one that never was; so is one that saves all
the time."""

import itertools

import pytest
import torch
from test_stop_and_resume import arguments, records, tensors, told

from dnal_dist import checkpoint, evaluate, loop, phases, pruning, saving, stopping
from dnal_dist.stopping import STOPPED, Stopped

# Four iterations an epoch, so that phases begin and end within epochs.
TINY = (
    "data.global_batch=90", "tracking.log_every=3", "tracking.tracker=none", "architecture.recalibration_batches=2",
    "phases.pretrain.steps=5", "phases.search.epochs=2", "phases.finetune.steps=6", "architecture.penalty_weight=0.2",
)  # fmt: skip
KINDS = {
    "plain": (),
    "parts of a batch": ("data.per_device_batch_limit=30",),
    "a target, a residual network": ("model.name=resnet_digits", "architecture.target.macs=0.5x", "phases.search.weight_steps=2"),
    "a supernet with noise": ("model.name=supernet_digits", "model.width=0.5", "data.global_batch=120"),
}


class Killed(BaseException):
    """Ends a run at once."""


@pytest.fixture(autouse=True)
def noise(monkeypatch, request):
    """Networks may draw from torch's generator: those of the last kind do."""
    if "noise" not in request.node.name:
        return
    step = loop.weight_step

    def noisy(trained, images, *more, **others):
        return step(trained, images + 0.1 * torch.randn_like(images), *more, **others)

    for room in (loop, phases):
        monkeypatch.setattr(room, "weight_step", noisy)


@pytest.fixture(scope="module")
def whole(train_here, digits, tmp_path_factory):
    """The run of a kind that was never stopped, and never saved while it trained."""
    done = {}

    def run(kind: str):
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp("whole") / "run"
            with pytest.MonkeyPatch.context() as patch:
                save = saving.save
                patch.setattr(saving, "save", lambda run, *more: save(run, *more) if run.phase == "done" else saving.settle(run))
                assert train_here(*arguments(digits, done[kind], *TINY, *KINDS[kind])).code == 0
            # Only that of its end, to compare.
            assert [path.name.split("-")[-1] for path in checkpoint.found(done[kind] / "checkpoints")] == ["done"]
        return done[kind]

    return run


def compare(run, reference) -> None:
    assert told(run) == told(reference)
    assert tensors(run) == tensors(reference)
    assert [r["digest"] for r in records(run, "receipt")] == [r["digest"] for r in records(reference, "receipt")]
    (ours, theirs) = (checkpoint.latest(one / "checkpoints")[1] for one in (run, reference))
    assert ours.tensors.keys() == theirs.tensors.keys() >= {"alpha", "alpha_momentum"}
    assert all(ours.tensors[key].equal(theirs.tensors[key]) for key in ours.tensors)
    counted = {"seconds", "records", "tracker_run", "recipe"}
    assert ours.state.model_dump(exclude=counted) == theirs.state.model_dump(exclude=counted)
    trained = [r["global_step"] for r in records(run, "train")]
    assert trained == sorted(set(trained))


@pytest.mark.parametrize("kind", KINDS)
def test_saving_after_every_step_changes_nothing(train_here, whole, digits, tmp_path, kind):
    run = tmp_path / "run"
    ended = train_here(*arguments(digits, run, *TINY, *KINDS[kind]), "checkpoint.every_steps=1")
    assert ended.code == 0, ended.err
    # One at the start, after each step that does not end a phase, and where the search, pruning, the finetune and the end begin.
    steps = records(run, "train")[-1]["global_step"]
    assert len(records(run, "checkpoint")) == 1 + (steps - 3) + 4
    compare(run, whole(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_after_every_step(train_here, whole, digits, tmp_path, monkeypatch, kind):
    """Politely: with a checkpoint of that very step. The same command goes on."""
    run, look, reference = tmp_path / "run", stopping.Edges.look, whole(kind)

    def stop_at_edges_of_steps(edges, *of_a_step):
        if of_a_step:
            raise Stopped("by the test")
        return look(edges)

    monkeypatch.setattr(stopping.Edges, "look", stop_at_edges_of_steps)
    codes = [STOPPED]
    while codes[-1] == STOPPED and len(codes) < 100:
        codes.append(train_here(*arguments(digits, run, *TINY, *KINDS[kind])).code)
    assert codes[-1] == 0 and len(codes) > 12
    compare(run, reference)
    assert [r["resumed"] for r in records(run, "start")] == [False] + [True] * (len(codes) - 2)


@pytest.mark.parametrize("kind", ["plain", "a target, a residual network"])
def test_killed_in_every_second_step(train_here, whole, digits, tmp_path, monkeypatch, kind):
    """With a checkpoint of the step before; what the lost step told is told again, and once."""
    run, taken, reference = tmp_path / "run", itertools.count(), whole(kind)

    def kill(edges, *of_a_step):
        if of_a_step and next(taken) % 2:
            raise Killed
        return False

    monkeypatch.setattr(stopping.Edges, "look", kill)
    ended, kills = None, 0
    while ended is None and kills < 100:
        try:
            ended = train_here(*arguments(digits, run, *TINY, *KINDS[kind]), "checkpoint.every_steps=1")
        except Killed:
            kills += 1
    assert ended.code == 0 and kills > 5
    compare(run, reference)


@pytest.mark.parametrize("which", range(7))
def test_stopped_within_an_evaluation(train_here, whole, digits, tmp_path, monkeypatch, which):
    """The whole run has seven, the fifth of them that of pruning. It is made anew, whatever it had done to running statistics."""
    run, evaluations = tmp_path / "run", itertools.count()
    original, reference = evaluate.evaluate, whole("plain")

    def interrupted(*arguments):
        *others, edge = arguments
        if next(evaluations) != which:
            return original(*arguments)

        def stop():
            (run / "stop").touch()
            edge()

        return original(*others, stop)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    monkeypatch.setattr(stopping, "LOOK_EVERY", 0)
    first = train_here(*arguments(digits, run, *TINY))
    assert first.code == STOPPED and f"stopped ({run}/stop is there) in " in first.err, first.err
    assert not (run / "stop").exists()
    second = train_here(*arguments(digits, run, *TINY))
    assert second.code == 0, second.err
    compare(run, reference)


@pytest.mark.parametrize("place", ["choose_by_gates", "recalibrate", "look"])
def test_killed_within_pruning(train_here, whole, digits, tmp_path, monkeypatch, place):
    run, original = tmp_path / "run", getattr(pruning, place)

    def die(*arguments, **others):
        original(*arguments, **others)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pruning, place, die)
        train_here(*arguments(digits, run, *TINY))
    ended = train_here(*arguments(digits, run, *TINY))
    assert ended.code == 0 and "resumed in prune after 0 steps" in ended.out
    compare(run, whole("plain"))
