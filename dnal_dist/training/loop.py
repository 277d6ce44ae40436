"""The iterations of a phase: steps, metrics, evaluations and checkpoints."""

import itertools
import time
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from dnal_dist.common.span import span
from dnal_dist.data.device import Fed, feed
from dnal_dist.data.receipts import Receipt
from dnal_dist.distributed.wrapper import Trained
from dnal_dist.search import schedule
from dnal_dist.tracking.progress import Pace, brief
from dnal_dist.training import divergence, mixing, state, usage
from dnal_dist.training.evaluate import evaluate
from dnal_dist.training.metrics import SOFT, Metrics, check_skipped, epochs
from dnal_dist.training.objective import objective
from dnal_dist.training.run import Run
from dnal_dist.training.steps import Outcome, weight_step
from dnal_dist.training.stopping import Stopped
from dnal_dist.training.usage import Clock

# Classes whose accuracies are recorded one by one.
MOST_CLASSES = 50_000
# A search of so many records of metrics, or fewer, has its gates in each of them.
FRAMES = 100


def training_batches(run: Run, fill: bool = True) -> Generator[Fed]:
    """The training batches from the run's position on, on its device. fill: keep their full size even if samples were skipped."""
    batches = run.train.batches(run.state.global_step)
    return feed(batches, run.recipe.data, run.context.device, run.local_batch if fill else 0, run.context.memory_format)


def without_gates(trained: Trained, step: int, images: Tensor, labels: Tensor, local_batch: int, accumulation: int) -> Outcome:
    return weight_step(trained, images, labels, local_batch, accumulation=accumulation)


def optimise(run: Run, batches: Generator[Fed], take_step: Callable[..., Outcome] = without_gates) -> None:
    """Take the remaining iterations of the current phase, with an evaluation and a checkpoint at each epoch's end. Raises
    stopping.Stopped, after a checkpoint, when a stop was requested.

    `take_step(trained, step, images, labels, local_batch, accumulation)` takes one iteration.
    """
    recipe, position, run_log = run.recipe, run.state, run.log
    phase = getattr(recipe.phases, position.phase)
    per_epoch = run.train.steps_per_epoch
    total = phase.iterations(per_epoch)
    accumulation = run.context.accumulation_steps(recipe.data)
    trained = run.context.wrap(run.network, phase.optimizer, run.momentum, recipe.training)
    trained.objective = objective(run, phase)
    if phase.ema is not None:
        trained.keep_average(phase.ema, run.average, run.average_statistics)
    run.average, run.average_statistics = {}, None
    metrics, clock = Metrics(run), Clock(run)
    result = metrics.summary
    run_log.begin(position.phase, total, position.step)
    pace = Pace(position.step, total, later(run))
    try:
        while True:
            if ends_epoch(run, total) and position.evaluated != position.global_step:
                result = _end_epoch(run, trained, metrics, clock, total)
            if position.step == total:
                break
            rate = schedule.learning_rate_at(phase, position.step, per_epoch)
            trained.set_rate(rate)
            with span("data wait"):
                fed = next(batches)
            # Later epochs have the same.
            counts = class_counts(run, fed.batch.labels) if position.global_step < per_epoch else ()
            run.receipt.take(fed.batch.tally, len(fed.batch.labels), fed.batch.bad, counts)
            metrics.add_batch(fed)
            classes = run.train.shards.num_classes
            images, labels = mixing.mixed(phase, fed.images, fed.labels, classes, recipe.seed, position.global_step)
            with metrics.measured_traffic():
                outcome = take_step(trained, position.step, images, labels, run.local_batch, accumulation)
            metrics.add_outcome(outcome)
            run.advance()
            if trained.average is not None:
                trained.average.update(position.step)
            if position.global_step % per_epoch == 0:
                record_receipt(run)
            if position.step % recipe.tracking.log_every == 0 or ends_epoch(run, total):
                result = metrics.record(trained, rate, total, position.step / per_epoch, pace)
                run_log.progress(position.step, result)
                _record_frame(run, total)
            if _checkpoint_is_due(run) and not ends_epoch(run, total):
                _save(run, trained, metrics, clock)
    except Stopped as stopped:
        run_log.record("stop", phase=position.phase, step=position.step, reason=str(stopped))
        _save(run, trained, metrics, clock)
        raise
    trained.close()
    run_log.finish(f"{result}  {brief(position.seconds[position.phase])}")
    run_log.record("phase", phase=position.phase, **usage.summary(position, position.phase), breakdown=run.breakdown.so_far())


def later(run: Run) -> int:
    """Iterations of the phases behind the present one."""
    names = ("pretrain", "search", "finetune")
    behind = names[names.index(run.state.phase) + 1 :]
    return sum(getattr(run.recipe.phases, name).iterations(run.train.steps_per_epoch) for name in behind)


def ends_epoch(run: Run, total: int) -> bool:
    """Whether an epoch of the phase, or the phase itself, which has `total` iterations, ends at this step."""
    step = run.state.step
    return step > 0 and (step % run.train.steps_per_epoch == 0 or step == total)


def _end_epoch(run: Run, trained: Trained, metrics: Metrics, clock: Clock, total: int) -> str:
    """Evaluate and save; at the phase's end the next phase saves instead. Returns the text of the progress line."""
    position = run.state
    with metrics.pause(), trained.averaged() as momentum:
        accuracy = evaluate_and_record(run, position.step / run.train.steps_per_epoch, position.step == total)
        position.evaluated, position.accuracy = position.global_step, accuracy
        per_epoch = run.train.steps_per_epoch
        result = f"{epochs(position.step / per_epoch, total / per_epoch)}  val {accuracy:.2%}  {metrics.summary}"
        if position.phase == "search" and position.step < total and not run.architecture.hard:
            run.log.explain(SOFT)
        warn_of_alpha(run)
        clock.record(metrics.bytes_sent() if position.step == total else None)
        if position.step < total:
            run.log.progress(position.step, result)
            if trained.average is None:
                state.save(run, momentum, metrics)
        elif trained.average is None:
            run.momentum = {name: buffer.cpu() for name, buffer in momentum.items()}
        else:
            run.momentum = {}  # that of other weights than those that stay
    if trained.average is not None and position.step < total:
        _save(run, trained, metrics, clock)
    return result


def warn_of_alpha(run: Run) -> None:
    """Tell once that images of a split have an alpha channel, and how many it was by then."""
    for stream in (run.train, run.val):
        if not stream.warned_of_alpha and (count := sum(run.context.gather([stream.with_alpha]))):
            stream.warned_of_alpha = True
            ground = "{}, {}, {}".format(*run.recipe.data.background)
            run.log.warn(
                f"key '{stream.shards.key}': {count} images so far have an alpha channel; what is transparent in them shows key "
                f"'data.background' ({ground})"
            )


def _checkpoint_is_due(run: Run) -> bool:
    """Polled between two steps. Raises Stopped."""
    settings = run.recipe.checkpoint
    run.writer.poll()
    due = settings.every_minutes is not None and run.writer.age > 60 * settings.every_minutes
    agreed = run.stops.poll(due, run.writer.seconds_for_one)
    return agreed or (settings.every_steps is not None and run.state.global_step % settings.every_steps == 0)


def _save(run: Run, trained: Trained, metrics: Metrics, clock: Clock) -> None:
    begun = time.monotonic()
    divergence.check(run, run.context.sum_(divergence.flags(run, trained)))
    with metrics.pause(), trained.gathered() as momentum:
        clock.record()
        if trained.average is not None:
            run.average, run.average_statistics = trained.average.whole(), trained.average.flat_statistics()
        # Gathering counts as pause: training waits for it.
        state.save(run, momentum, metrics, begun)
        run.average, run.average_statistics = {}, None


def delta_at(run: Run, step: int) -> float:
    """Hardness of the gates in the search's iteration after `step` others."""
    return schedule.delta_at(run.recipe.phases.search, run.recipe.architecture, step, run.train.steps_per_epoch)


def evaluate_and_record(run: Run, epoch: float, ends_phase: bool) -> float:
    """Accuracy of the current network on the validation set, recorded by class too at a phase's end. Nothing is recorded if a stop
    interrupts the evaluation."""
    run.context.average_statistics(run.network)
    gates, step = None, run.state.step
    if run.state.phase == "search":
        delta = delta_at(run, step - 1)
        run.context.agree("alpha", run.supernet.by_site(run.architecture.alpha.detach()))
        run.context.agree("the hardness of the gates", {"delta": torch.tensor(delta, dtype=torch.float64)})
        gates = run.architecture.gates(delta).detach()
    batches, seen = -(-run.val.samples // run.recipe.data.global_batch), itertools.count(1)

    def between() -> None:
        run.stops.poll()
        run.log.doing("evaluation", next(seen), batches)

    found = evaluate(run.network, run.val, run.recipe.data, run.context, gates, between)
    if gates is not None:
        record_gates(run, delta)
    check_skipped(run, found.bad, run.val, "data.val")
    divergence.check(run, [], found.cross_entropy)
    values = {k: round(v, 6) for k, v in found._asdict().items() if k not in ("bad", "per_class")}
    classes = found.per_class if ends_phase and len(found.per_class) <= MOST_CLASSES else None
    run.log.record("eval", phase=run.state.phase, step=step, epoch=round(epoch, 4), **values, per_class=classes)
    return found.accuracy


def record_gates(run: Run, delta: float) -> None:
    gates = run.architecture.gates(delta).detach().cpu()
    kept = run.architecture.keep(delta, run.recipe.architecture.threshold).cpu()
    run.log.record(
        "gates",
        phase="search",
        step=run.state.step,
        epoch=round(run.state.step / run.train.steps_per_epoch, 4),
        delta=None if run.architecture.hard else delta,
        histogram=torch.histc(gates, 20, 0, 1).int().tolist(),
        by_site={site: torch.histc(part, 10, 0, 1).int().tolist() for site, part in run.supernet.by_site(gates).items()},
        open={site: int(part.sum()) for site, part in run.supernet.by_site(kept).items()},
    )


def _record_frame(run: Run, total: int) -> None:
    """Record the gates of a search of `total` iterations with the metrics if it is short, for the report to go through them."""
    if run.state.phase == "search" and total <= FRAMES * run.recipe.tracking.log_every and not ends_epoch(run, total):
        record_gates(run, delta_at(run, run.state.step - 1))


def class_counts(run: Run, labels: Tensor) -> list[int]:
    """Samples of each class among `labels` (n,), on the CPU; empty for more classes than are recorded one by one."""
    classes = run.train.shards.num_classes
    return torch.bincount(labels, minlength=classes).tolist() if classes <= MOST_CLASSES else []


def record_receipt(run: Run) -> None:
    """Record the samples consumed in the epoch that ends here, or in the part of it that was trained."""
    state.merge_receipts(run)
    run.log.record("receipt", **run.receipt.packed())
    run.receipt = Receipt()
