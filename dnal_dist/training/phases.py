"""The phases of a run: pretrain, search, prune, finetune."""

import contextlib

from safetensors import SafetensorError

from dnal_dist.common.errors import InputError
from dnal_dist.common.span import span, spanned
from dnal_dist.nets import compact
from dnal_dist.search import schedule
from dnal_dist.search.penalty import Penalty
from dnal_dist.training import state
from dnal_dist.training.loop import delta_of, fed, look, optimise, record_gates, write_receipt
from dnal_dist.training.pruning import prune
from dnal_dist.training.run import Run
from dnal_dist.training.steps import Outcome, architecture_step, weight_step


def go(run: Run) -> None:
    """From where `run` stands to its end. Raises stopping.Stopped if it was asked to stop; what it goes on from is saved then."""
    with span("training", run):
        _phases(run)


def _phases(run: Run) -> None:
    if not run.resumed:
        # A disk that takes no checkpoint is better known now than hours from now.
        state.save(run, {})
        run.writer.settle()
    # A stream has one reader at a time, and pruning looks at batches that the finetune will see again.
    with contextlib.closing(fed(run)) as batches:
        if run.phase == "pretrain":
            pretrain(run, batches)
        if run.phase == "search":
            search(run, batches)
    if run.phase == "prune":
        prune(run)
        _enter(run, "finetune")
    with contextlib.closing(fed(run)) as batches:
        if run.phase == "finetune":
            finetune(run, batches)


@spanned("pretrain")
def pretrain(run: Run, batches) -> None:
    """Weights only, without gates; not at all if the recipe gives it no iterations."""
    given = run.recipe.model.init_from
    if given and run.step == 0:
        run.log.say(f"accuracy {look(run, epoch=0.0):.2%} with the weights of {given}")
    if run.recipe.phases.pretrain.iterations(run.train.steps_per_epoch):
        optimise(run, batches)
    _enter(run, "search")


@spanned("search")
def search(run: Run, batches) -> None:
    """Weights and architecture in turn, while delta grows and the gates harden."""
    settings, phase = run.recipe.architecture, run.recipe.phases.search
    total = phase.iterations(run.train.steps_per_epoch)
    penalty = Penalty(settings, phase, total, run.supernet, run.recipe.data.image_size, run.architecture, run.budget)

    def step_either(trained, step, images, labels, share, parts) -> Outcome:
        delta = delta_of(run, step)
        if not schedule.is_architecture_step(step, phase.weight_steps, phase.architecture_steps):
            return weight_step(trained, images, labels, share, run.architecture.gates(delta), parts)
        return architecture_step(
            trained,
            run.architecture,
            run.architecture_optimizer,
            images,
            labels,
            share,
            delta,
            settings.penalty,
            penalty_weight(run, penalty, delta, step),
            run.context.average_,
            penalty.cost_fraction,
            parts,
            settings.optimizer.clip_norm,
        )

    if run.step == 0:
        record_gates(run, settings.delta_start)
    optimise(run, batches, step_either)
    assert run.step == total
    _enter(run, "prune")


def penalty_weight(run: Run, penalty: Penalty, delta: float, step: int) -> float:
    """The penalty weight of the search's iteration `step`. Below the recipe's floor of MACs the penalty is frozen."""
    settings = run.recipe.architecture
    if run.budget is not None:
        run.penalty_weight, run.penalty_lag = penalty.driven(delta, step, run.penalty_lag)
        return run.penalty_weight
    if penalty.guard_is_due(step):
        fraction = penalty.collapsing(delta)
        if fraction is not None and not run.penalty_rests:
            run.log.global_step = run.global_step
            run.log.warn(
                f"the architecture is collapsing: {fraction:.2%} of the MACs are left, architecture.min_macs is "
                f"{settings.min_macs:.1%}; the penalty rests. Lower architecture.penalty_weight ({settings.penalty_weight:g})"
            )
        run.penalty_rests = fraction is not None
    return 0.0 if run.penalty_rests else settings.penalty_weight


@spanned("finetune")
def finetune(run: Run, batches) -> None:
    """Weights of the compact network."""
    optimise(run, batches)
    _finish(run)
    _enter(run, "done")


@spanned("compact write")
def _finish(run: Run) -> None:
    """Write what the run was for."""
    if run.global_step % run.train.steps_per_epoch:
        write_receipt(run)
    if run.context.main:
        facts = {"name": run.recipe.model.name, "image_size": run.recipe.data.image_size}
        data = {"mean": run.recipe.data.mean, "std": run.recipe.data.std}
        try:
            compact.save(run.small, run.folder / "compact", **facts, **data)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{run.folder / 'compact'}: cannot be written ({error}); make room, then use the same command again", local=True
            ) from None


def _enter(run: Run, phase: str) -> None:
    """Begin `phase`, from a checkpoint on."""
    run.phase, run.step, run.accuracy = phase, 0, None
    # The compact network begins without any.
    state.save(run, {} if phase == "prune" else run.momentum)
