"""The iterations of a phase: steps, what is told of them, evaluations and checkpoints."""

import time
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from dnal_dist.common.span import span
from dnal_dist.data.device import Fed, feed
from dnal_dist.data.receipts import Receipt
from dnal_dist.distributed.wrapper import Trained
from dnal_dist.search import schedule
from dnal_dist.training import state, usage
from dnal_dist.training.evaluate import evaluate
from dnal_dist.training.metrics import Meter, check_finite, check_skipped
from dnal_dist.training.run import Run
from dnal_dist.training.steps import Outcome, weight_step
from dnal_dist.training.stopping import Stopped
from dnal_dist.training.usage import Clock


def fed(run: Run, fill: bool = True) -> Generator[Fed]:
    """The training batches from where `run` stands on, on its device; in full size even if samples had to be skipped."""
    share = run.recipe.data.global_batch // run.context.world_size
    return feed(run.train.batches(run.global_step), run.recipe.data, run.context.device, share if fill else 0)


def without_gates(trained: Trained, step: int, images: Tensor, labels: Tensor, share: int, parts: int) -> Outcome:
    return weight_step(trained, images, labels, share, parts=parts)


def optimise(run: Run, batches, do: Callable[..., Outcome] = without_gates) -> None:
    """Take the iterations of the current phase that are left, evaluating and saving at each epoch's end. Raises stopping.Stopped if
    that was asked for, with a checkpoint of where it stopped.

    `do(trained, step, images, labels, share, parts)` takes one of them.
    """
    recipe, context, run_log = run.recipe, run.context, run.log
    phase = getattr(recipe.phases, run.phase)
    per_epoch = run.train.steps_per_epoch
    total = phase.iterations(per_epoch)
    share, parts = recipe.data.global_batch // context.world_size, context.parts(recipe.data)
    trained = context.wrap(run.network, phase.optimizer, run.momentum, recipe.training)
    meter = Meter(run)
    result = meter.summary
    clock = Clock(run)
    run_log.begin(run.phase, total, run.step)
    try:
        while True:
            if ends_epoch(run, total) and run.evaluated != run.global_step:
                result = _end_epoch(run, trained, meter, clock, total)
            if run.step == total:
                break
            rate = schedule.learning_rate_at(phase, run.step, per_epoch)
            trained.set_rate(rate)
            with span("data wait"):
                images, labels = meter.next(batches)
            with meter.listen():
                outcome = do(trained, run.step, images, labels, share, parts)
            meter.add(outcome)
            run.step += 1
            run.global_step += 1
            run.accuracy = None
            if run.global_step % per_epoch == 0:
                write_receipt(run)
            if run.step % recipe.tracking.log_every == 0 or ends_epoch(run, total):
                result = meter.log(rate, total, run.step / per_epoch)
                run_log.progress(run.step, result)
            if _is_time_to_save(run) and not ends_epoch(run, total):
                _save(run, trained, meter, clock)
    except Stopped as stopped:
        run_log.global_step = run.global_step
        run_log.record("stop", phase=run.phase, step=run.step, reason=str(stopped))
        _save(run, trained, meter, clock)
        raise
    trained.close()
    run_log.finish(f"{result}  {run.seconds[run.phase]:.0f} s")
    run_log.record("phase", phase=run.phase, **usage.told(run, run.phase))


def ends_epoch(run: Run, total: int) -> bool:
    """Whether the run stands behind the last iteration of an epoch of the phase, or of the phase, which has `total`."""
    return run.step > 0 and (run.step % run.train.steps_per_epoch == 0 or run.step == total)


def _end_epoch(run: Run, trained: Trained, meter: Meter, clock: Clock, total: int) -> str:
    """Evaluate, and save unless the phase ends here, which has a checkpoint of its own. Returns what the progress line says."""
    with meter.pause(), trained.gathered() as momentum:
        accuracy = look(run, run.step / run.train.steps_per_epoch)
        run.evaluated, run.accuracy = run.global_step, accuracy
        result = f"accuracy {accuracy:.2%}  {meter.summary}"
        clock.tell(meter.bytes_sent() if run.step == total else None)
        if run.step < total:
            run.log.progress(run.step, result)
            state.save(run, momentum, meter)
        else:
            run.momentum = {name: buffer.cpu() for name, buffer in momentum.items()}
    return result


def _is_time_to_save(run: Run) -> bool:
    """At a step's edge. Raises Stopped."""
    settings = run.recipe.checkpoint
    run.writer.poll()
    due = settings.every_minutes is not None and run.writer.age > 60 * settings.every_minutes
    asked = run.edges.look(due, run.writer.seconds_for_one)
    return asked or (settings.every_steps is not None and run.global_step % settings.every_steps == 0)


def _save(run: Run, trained: Trained, meter: Meter, clock: Clock) -> None:
    begun = time.monotonic()
    with meter.pause(), trained.gathered() as momentum:
        clock.tell()
        # Gathering is part of what training waits for.
        state.save(run, momentum, meter, begun)


def delta_of(run: Run, step: int) -> float:
    """Hardness of the gates in the search's iteration after `step` others."""
    return schedule.delta_at(run.recipe.phases.search, run.recipe.architecture, step, run.train.steps_per_epoch)


def look(run: Run, epoch: float) -> float:
    """Evaluate the current network on the validation set, record it and return its accuracy. If that is stopped, nothing is
    recorded."""
    run.context.average_statistics(run.network)
    gates = None
    if run.phase == "search":
        delta = delta_of(run, run.step - 1)
        run.context.agree("alpha", run.supernet.by_site(run.architecture.alpha.detach()))
        run.context.agree("the hardness of the gates", {"delta": torch.tensor(delta, dtype=torch.float64)})
        gates = run.architecture.gates(delta).detach()
    found = evaluate(run.network, run.val, run.recipe.data, run.context, gates, run.edges.look)
    if gates is not None:
        record_gates(run, delta)
    run.log.global_step = run.global_step
    check_skipped(run, found.bad, run.val, "data.val")
    check_finite(run, found.cross_entropy)
    values = {k: round(v, 6) for k, v in found._asdict().items() if k != "bad"}
    run.log.record("eval", phase=run.phase, step=run.step, epoch=round(epoch, 4), **values)
    return found.accuracy


def record_gates(run: Run, delta: float) -> None:
    run.log.global_step = run.global_step
    gates = run.architecture.gates(delta).detach().cpu()
    kept = run.architecture.keep(delta, run.recipe.architecture.threshold).cpu()
    run.log.record(
        "gates",
        phase="search",
        step=run.step,
        epoch=round(run.step / run.train.steps_per_epoch, 4),
        delta=delta,
        histogram=torch.histc(gates, 20, 0, 1).int().tolist(),
        by_site={site: torch.histc(part, 10, 0, 1).int().tolist() for site, part in run.supernet.by_site(gates).items()},
        open={site: int(part.sum()) for site, part in run.supernet.by_site(kept).items()},
    )


def write_receipt(run: Run) -> None:
    """Record what was consumed of the epoch that ends here, or of its part that the run came to."""
    state.settle(run)
    run.log.global_step = run.global_step
    run.log.record("receipt", **run.receipt.packed())
    run.receipt = Receipt()
