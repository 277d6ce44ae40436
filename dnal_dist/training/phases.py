"""The phases of a run: pretrain, search, prune, finetune."""

import contextlib
from collections.abc import Generator

import torch
from safetensors import SafetensorError
from torch import Tensor

from dnal_dist.common.errors import InputError, reason, remedy
from dnal_dist.common.phases import Phase
from dnal_dist.common.span import attached, span, spanned
from dnal_dist.data.device import Fed
from dnal_dist.distributed.wrapper import Trained
from dnal_dist.nets import compact
from dnal_dist.search import schedule, signal, taylor
from dnal_dist.search.penalty import Penalty
from dnal_dist.training import state
from dnal_dist.training.loop import delta_at, evaluate_and_record, optimise, record_gates, record_receipt, training_batches
from dnal_dist.training.pruning import prune
from dnal_dist.training.run import Run
from dnal_dist.training.steps import Outcome, architecture_step, weight_step
from dnal_dist.training.stopping import Stopped


def train(run: Run, until: Phase | None = None) -> bool:
    """Take all phases that are left, or those up to `until`, and return whether the run is finished. Raises stopping.Stopped, after
    a checkpoint to resume from, when a stop was requested."""
    with attached(run.breakdown), span("training", run):
        _phases(run, until)
    return run.state.phase == "done"


def _phases(run: Run, until: Phase | None) -> None:
    if not run.resumed:
        # A disk that takes no checkpoint is better known now than hours from now.
        state.save(run, {})
        run.writer.settle()
    # A stream has one reader at a time, and pruning reads batches that the finetune will see again.
    with contextlib.closing(training_batches(run)) as batches:
        if run.state.phase == "pretrain":
            pretrain(run, batches)
        if run.state.phase == "search" and until != "pretrain":
            search(run, batches)
    if until is not None:
        return
    if run.state.phase == "prune":
        try:
            prune(run)
        except Stopped as stopped:
            # The run resumes from the checkpoint before, and prunes again.
            run.log.record("stop", phase="prune", step=0, reason=str(stopped))
            raise
        enter(run, "finetune")
    with contextlib.closing(training_batches(run)) as batches:
        if run.state.phase == "finetune":
            finetune(run, batches)


@spanned("pretrain")
def pretrain(run: Run, batches: Generator[Fed]) -> None:
    """Weights only, without gates; skipped if the recipe gives it no iterations."""
    source = run.recipe.model.init_from
    if source and run.state.step == 0:
        run.log.begin("start", 1, 0)
        accuracy = evaluate_and_record(run, 0.0, ends_phase=False)
        run.log.finish(f"val {accuracy:.2%}  with the weights of {source}")
    if run.recipe.phases.pretrain.iterations(run.train.steps_per_epoch):
        optimise(run, batches)
    enter(run, "search")


@spanned("search")
def search(run: Run, batches: Generator[Fed]) -> None:
    """Weights and architecture in turn, while delta grows and the gates harden."""
    settings, phase = run.recipe.architecture, run.recipe.phases.search
    total = phase.iterations(run.train.steps_per_epoch)
    first = run.state.step
    penalty = Penalty(settings, phase, total, run.supernet, run.recipe.data.image_size, run.architecture, run.budget)

    def step_either(trained, step, images, labels, local_batch, accumulation) -> Outcome:
        delta = delta_at(run, step)
        if run.architecture.hard:
            begin_round(run, trained, step, step == first)
        if not schedule.is_architecture_step(step, phase.weight_steps, phase.architecture_steps):
            return weight_step(trained, images, labels, local_batch, run.architecture.gates(delta), accumulation)
        outcome = architecture_step(
            trained,
            run.architecture,
            run.architecture_optimizer,
            images,
            labels,
            local_batch,
            delta,
            settings.penalty,
            penalty_weight(run, penalty, delta, step),
            run.context.average_,
            penalty.cost_fraction,
            accumulation,
            None if run.architecture.hard else settings.optimizer.clip_norm,
        )
        check_signal(run, outcome.gradient, step, total)
        return outcome

    if run.state.step == 0:
        record_gates(run, settings.delta_start)
    optimise(run, batches, step_either)
    assert run.state.step == total
    enter(run, "prune")


def begin_round(run: Run, trained: Trained, step: int, first: bool) -> None:
    """Of criterion taylor: close channels if a round ends before the search's iteration `step`, and compute them no more. first:
    whether it is the first one of this process."""
    recipe, phase = run.recipe, run.recipe.phases.search
    number = taylor.due(step, phase.iterations(run.train.steps_per_epoch), phase.cycle)
    if number is not None:
        taylor.close(run.supernet, recipe.data.image_size, run.architecture, run.budget, number, recipe.architecture)
    if recipe.training.skip_closed and (first or number is not None):
        keep = run.architecture.alpha.detach() >= 0
        # Processes that decided otherwise would wait for each other's statistics.
        why = run.context.from_main(trained.why_not_slim(keep) if run.context.main else None)
        if why:
            run.log.explain(f"closed channels are computed on, because {why}")
        # Whatever was computed before, so that a resumed run computes the same.
        trained.slim(keep if why is None else torch.ones_like(keep))


def penalty_weight(run: Run, penalty: Penalty, delta: float, step: int) -> float:
    """The penalty weight of the search's iteration `step`. Below the recipe's floor of MACs the penalty is frozen."""
    settings, position = run.recipe.architecture, run.state
    if run.architecture.hard:
        return 0.0
    if run.budget is not None:
        position.penalty_weight, position.penalty_lag = penalty.driven(delta, step, position.penalty_lag)
        return position.penalty_weight
    if penalty.guard_is_due(step):
        fraction = penalty.collapsing(delta)
        if fraction is not None and not position.penalty_frozen:
            run.log.warn(
                f"the architecture is collapsing: {fraction:.2%} of the MACs are left, architecture.min_macs is "
                f"{settings.min_macs:.1%}; the penalty is frozen. Lower architecture.penalty_weight ({settings.penalty_weight:g})"
            )
        position.penalty_frozen = fraction is not None
    return 0.0 if position.penalty_frozen else settings.penalty_weight


def check_signal(run: Run, gradient: Tensor, step: int, total: int) -> None:
    """Count the gates' gradient of the search's iteration `step` of `total`; with the last that counts record how many gates' stand
    out of noise, and warn if few do."""
    phase = run.recipe.phases.search
    done, every = (schedule.architecture_steps(n, phase.weight_steps, phase.architecture_steps) for n in (step + 1, total))
    if done > signal.BATCHES:
        return
    # What has closed by criterion taylor may have no gradient any more.
    run.signal = signal.add(run.signal, gradient, run.architecture.alpha.detach() >= 0 if run.architecture.hard else None)
    if done < min(signal.BATCHES, every):
        return
    batches, share = int(run.signal[0].max()), signal.share(run.signal)
    run.signal = None
    run.log.record("signal", phase="search", step=step + 1, batches=batches, significant=round(share, 6))
    if blind := signal.blindness(run.recipe, share, batches):
        run.log.warn(f"the search sees little: {blind[0]}; {', or '.join(blind[1])}")


@spanned("finetune")
def finetune(run: Run, batches: Generator[Fed]) -> None:
    """Weights of the compact network."""
    optimise(run, batches)
    _write_compact(run)
    enter(run, "done")


@spanned("compact write")
def _write_compact(run: Run) -> None:
    if run.state.global_step % run.train.steps_per_epoch:
        record_receipt(run)
    if run.context.main:
        facts = {"name": run.recipe.model.name, "image_size": run.recipe.data.image_size}
        data = {"mean": run.recipe.data.mean, "std": run.recipe.data.std}
        try:
            compact.save(run.compact, run.folder / "compact", **facts, **data)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{run.folder / 'compact'}: cannot be written ({reason(error)}); {remedy(error)}, then use the same command again",
                local=True,
            ) from None


def enter(run: Run, phase: Phase) -> None:
    """Begin `phase` with a checkpoint."""
    run.state.phase, run.state.step, run.state.accuracy = phase, 0, None
    # The compact network starts without momentum.
    state.save(run, {} if phase == "prune" else run.momentum)
