"""A run that is stopped or killed wherever it stands, and goes on, is bit for bit the one that never was; so is one that saves all
the time."""

import itertools

import pytest
import torch
from runs import Killed, arguments, records, tensors, training_records

from dnal_dist import recipe
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.checkpoint.format import RunState, Usage
from dnal_dist.distributed.context import Context
from dnal_dist.nets.slim import Slim
from dnal_dist.recipe import Keep
from dnal_dist.training import evaluate, loop, phases, pruning, setup, state, stopping
from dnal_dist.training import state as training_state
from dnal_dist.training.metrics import Metrics
from dnal_dist.training.state import merge_receipts
from dnal_dist.training.stopping import STOPPED, Stopped

# Four iterations an epoch, so that phases begin and end within epochs.
TINY = (
    "data.global_batch=90", "tracking.log_every=3", "tracking.tracker=none", "tracking.plots=false",
    "architecture.recalibration_batches=2",
    "phases.pretrain.steps=5", "phases.search.epochs=2", "phases.finetune.steps=6", "architecture.penalty_weight=0.2",
    "model.width=0.5",
)  # fmt: skip
# Of what is stopped in every step: the search still begins and ends within an epoch, and so does the finetune.
FEWER = ("phases.pretrain.steps=3", "phases.search.epochs=null", "phases.search.steps=6", "phases.finetune.steps=4")
KINDS = {
    "plain": (),
    "micro-batches in channels_last, with options": (
        *FEWER,
        "data.per_device_batch_limit=30", "training.memory_format=channels_last",
        "phases.pretrain.optimizer.nesterov=true", "phases.search.optimizer.decay_norms=false",
        "phases.pretrain.schedule.warmup=3", "phases.finetune.label_smoothing=0.1", "phases.distillation.temperature=2.0",
        "phases.pretrain.ema=0.9", "phases.finetune.ema=0.9",
        "phases.finetune.optimizer={kind: adamw, lr: 0.001}", "phases.search.mixup=0.2", "phases.finetune.cutmix=1.0",
        "data.augmentation.policy=trivial_augment", "data.augmentation.erasing=0.3", "data.augmentation.repeats=3",
        "data.sampling=[1,1,1,1,1,1,1,1,1,5]",
    ),
    "a target, a residual network": (
        *FEWER, "model.name=resnet_digits", "architecture.target.macs=0.5x", "phases.search.weight_steps=2",
    ),
    "a supernet with noise, by taylor": (
        *FEWER,
        "model.name=supernet_digits", "model.width=0.25", "data.global_batch=120", "phases.pretrain.steps=4",
        "architecture.criterion=taylor", "architecture.candidates=one", "architecture.target.macs=0.1x",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def noise(monkeypatch, request):
    """Steps may draw from torch's generator: those of the last kind do, and at its end few channels are computed."""
    if "noise" not in request.node.name:
        yield
        return
    step, forward, passes = loop.weight_step, Slim.forward, []
    monkeypatch.setattr(Slim, "forward", lambda self, images: passes.append(self) or forward(self, images))

    def noisy(trained, images, *more, **others):
        return step(trained, images + 0.1 * torch.randn_like(images), *more, **others)

    for room in (loop, phases):
        monkeypatch.setattr(room, "weight_step", noisy)
    yield
    assert passes


@pytest.fixture(scope="module")
def whole(train_here, digits, tmp_path_factory):
    """The run of a kind that was never stopped, and never saved while it trained."""
    done = {}

    def run(kind: str):
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp("whole") / "run"
            with pytest.MonkeyPatch.context() as patch:
                save = training_state.save
                patch.setattr(
                    state, "save", lambda run, *more: save(run, *more) if run.state.phase == "done" else merge_receipts(run)
                )
                assert train_here(*arguments(digits, done[kind], *TINY, *KINDS[kind])).code == 0
            # Only that of its end, to compare.
            assert [path.name.split("-")[-1] for path in checkpoint.found(done[kind] / "checkpoints")] == ["done"]
        return done[kind]

    return run


def compare(run, reference) -> None:
    assert training_records(run) == training_records(reference)
    assert tensors(run) == tensors(reference)
    assert [r["digest"] for r in records(run, "receipt")] == [r["digest"] for r in records(reference, "receipt")]
    (ours, theirs) = (checkpoint.latest(one / "checkpoints")[1] for one in (run, reference))
    assert ours.tensors.keys() == theirs.tensors.keys() >= {"alpha"}
    assert all(ours.tensors[key].equal(theirs.tensors[key]) for key in ours.tensors)
    counted = {"seconds", "usage", "records", "tracker_run", "recipe"}
    assert ours.state.model_dump(exclude=counted) == theirs.state.model_dump(exclude=counted)
    trained = [r["global_step"] for r in records(run, "train")]
    assert trained == sorted(set(trained))


def test_saving_after_every_step_changes_nothing(train_here, whole, digits, tmp_path):
    kind, run = "plain", tmp_path / "run"
    ended = train_here(*arguments(digits, run, *TINY, *KINDS[kind]), "checkpoint.every_steps=1")
    assert ended.code == 0, ended.err
    # One at the start, after each step that does not end a phase, and where the search, pruning, the finetune and the end begin.
    steps = records(run, "train")[-1]["global_step"]
    assert len(records(run, "checkpoint")) == 1 + (steps - 3) + 4
    compare(run, whole(kind))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_a_run_stopped_after_every_step_ends_bit_equal(train_here, whole, digits, tmp_path, monkeypatch, kind):
    """Politely: with a checkpoint of that very step. The same command goes on."""
    run, look, reference = tmp_path / "run", stopping.StopPoll.poll, whole(kind)

    def stop_at_edges_of_steps(edges, *of_a_step):
        if of_a_step:
            raise Stopped("by the test")
        return look(edges)

    monkeypatch.setattr(stopping.StopPoll, "poll", stop_at_edges_of_steps)
    codes = [STOPPED]
    while codes[-1] == STOPPED and len(codes) < 100:
        codes.append(train_here(*arguments(digits, run, *TINY, *KINDS[kind])).code)
    assert codes[-1] == 0 and len(codes) > 12
    compare(run, reference)
    assert [r["resumed"] for r in records(run, "start")] == [False] + [True] * (len(codes) - 2)


def test_a_run_killed_in_every_second_step_ends_bit_equal(train_here, whole, digits, tmp_path, monkeypatch):
    """With a checkpoint of the step before; what the lost step recorded is recorded again, and once."""
    kind = "a target, a residual network"
    run, taken, reference = tmp_path / "run", itertools.count(), whole(kind)

    def kill(edges, *of_a_step):
        if of_a_step and next(taken) % 2:
            raise Killed
        return False

    monkeypatch.setattr(stopping.StopPoll, "poll", kill)
    ended, kills = None, 0
    while ended is None and kills < 100:
        try:
            ended = train_here(*arguments(digits, run, *TINY, *KINDS[kind]), "checkpoint.every_steps=1")
        except Killed:
            kills += 1
    assert ended.code == 0 and kills > 5
    compare(run, reference)


def test_a_run_stopped_within_every_evaluation_ends_bit_equal(train_here, whole, digits, tmp_path, monkeypatch):
    """The whole run has seven, the fifth of them that of pruning. One that was stopped is repeated, whatever it had done to running
    statistics."""
    run, original, reference = tmp_path / "run", evaluate.evaluate, whole("plain")
    stopped: set[int] = set()

    def interrupted(*arguments):
        *others, edge = arguments
        done = len(records(run, "eval"))
        if done in stopped:
            return original(*arguments)

        def stop():
            stopped.add(done)
            (run / "stop").touch()
            edge()

        return original(*others, stop)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    monkeypatch.setattr(stopping, "POLL_EVERY", 0)
    for number in range(7):
        ended = train_here(*arguments(digits, run, *TINY))
        assert ended.code == STOPPED and f"stopped ({run}/stop is there) in " in ended.err, ended.err
        assert not (run / "stop").exists() and len(stopped) == number + 1
    last = train_here(*arguments(digits, run, *TINY))
    assert last.code == 0, last.err
    compare(run, reference)


def test_a_run_killed_at_every_place_of_pruning_ends_bit_equal(train_here, whole, digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for place in ("select_by_gates", "recalibrate", "evaluate_and_record"):
        original = getattr(pruning, place)

        def die(*arguments, original=original, **others):
            original(*arguments, **others)
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(pruning, place, die)
            train_here(*arguments(digits, run, *TINY))
    ended = train_here(*arguments(digits, run, *TINY))
    assert ended.code == 0 and "resumed in prune after 0 steps" in ended.out
    compare(run, whole("plain"))


def test_everything_saved_is_restored(digits, tmp_path):
    """Also what the runs above do not come to: a guard that has acted, samples that were skipped."""
    settings = recipe.load("recipes/digits.yaml", [*arguments(digits, tmp_path / "run", *TINY)[1:]])
    run = setup.prepare(settings, Context())
    values = {
        "phase": "search", "step": 3, "global_step": 8, "evaluated": 8, "accuracy": 0.5, "penalty_frozen": True,
        "penalty_weight": -0.25, "penalty_lag": 1.5, "mask": "AAAA", "seconds": {"pretrain": 2.5},
        "usage": {"pretrain": Usage(images=80, device_seconds=5.0, energy_kwh=0.25, bytes_sent=7)},
        "skipped": {"an image", "another"},
    }  # fmt: skip
    for key, value in values.items():
        assert getattr(run.state, key) != value
        setattr(run.state, key, value)
    torch.nn.init.normal_(run.architecture.alpha)
    momentum = {name: torch.randn_like(p) for name, p in run.supernet.named_parameters()}
    metrics = Metrics(run)
    metrics.sums += torch.arange(7)
    metrics.skipped, metrics.summary, metrics.bytes = {"an image"}, "loss 1", {"comm/bytes_weight_step": 7}
    metrics.steps, metrics.sent = {"comm/bytes_weight_step": 3}, 100
    run.receipt.take((5, 6), 90, [])
    training_state.save(run, momentum, metrics)
    random = torch.rand(3, generator=torch.Generator().set_state(torch.get_rng_state()))
    assert run.writer.finish()
    run.log.close()
    run.close()

    again = setup.prepare(settings, Context())
    assert {key: getattr(again.state, key) for key in values} == values
    assert again.architecture.alpha.equal(run.architecture.alpha)
    assert again.momentum.keys() == momentum.keys() and all(again.momentum[key].equal(momentum[key]) for key in momentum)
    assert again.receipt == run.receipt and again.receipt.samples == 90
    assert torch.rand(3).equal(random)
    resumed = Metrics(again)
    assert resumed.sums.equal(metrics.sums) and resumed.pending().model_dump(exclude={"seconds"}) == metrics.pending().model_dump(
        exclude={"seconds"}
    )
    again.log.close()
    again.close()


INCONSISTENT = {
    "a phase before pruning with a compact network": lambda t, s: s.update(compact=[["Flatten", []]]),
    "a finetune without one": lambda t, s: s.update(phase="finetune"),
    "weights of another network": lambda t, s: t.update({"network.more": torch.zeros(3)}),
    "weights of another kind": lambda t, s: t.update({"network.classifier.0.weight": t["network.classifier.0.weight"].char()}),
    "momentum of another kind": lambda t, s: t.update({"momentum.classifier.0.weight": t["network.classifier.0.weight"].char()}),
    "momentum of nothing": lambda t, s: t.update({"momentum.more": torch.zeros(3)}),
    "no alpha": lambda t, s: t.pop("alpha"),
    "too few alphas": lambda t, s: t.update(alpha=t["alpha"][:5].clone()),
    "no generator": lambda t, s: t.pop("ranks.random"),
    "an empty generator": lambda t, s: t.update({"ranks.random": torch.zeros(1, 0, dtype=torch.uint8)}),
    "no sums": lambda t, s: t.pop("ranks.sums"),
    "sums of another form": lambda t, s: t.update({"ranks.sums": torch.zeros(1, 2, dtype=torch.float64)}),
    "a receipt of another form": lambda t, s: s.update(receipt={"epoch": 1}),
}


@pytest.mark.parametrize("kind", INCONSISTENT)
def test_a_checkpoint_that_does_not_fit_itself_is_refused_in_a_line(train_here, digits, tmp_path, kind):
    """Whoever writes one can make its manifest fit."""
    run = tmp_path / "run"
    assert train_here(*arguments(digits, run, *TINY), "--max-time=1s").code == STOPPED
    _, (tensors, state), _ = checkpoint.latest(run / "checkpoints")
    changed = state.model_dump()
    INCONSISTENT[kind](tensors, changed)
    checkpoint.write(run / "checkpoints", checkpoint.Checkpoint(tensors, RunState(**changed)), Keep(last=9, best=0))
    if changed["phase"] != state.phase:
        assert checkpoint.latest(run / "checkpoints")[1].state.phase == changed["phase"]
    ended = train_here(*arguments(digits, run, *TINY))
    assert ended.code == 2, ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error: {run}: the checkpoint of step 1 does not fit the recipe or itself (")
