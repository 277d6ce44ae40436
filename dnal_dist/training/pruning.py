"""From the supernet to the compact network, between the search and the finetune."""

import contextlib

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.common.span import span, spanned
from dnal_dist.nets import compact, cost, masks
from dnal_dist.search import budgets, selection, taylor
from dnal_dist.training import timed, usage
from dnal_dist.training.loop import evaluate_and_record, training_batches
from dnal_dist.training.run import Run
from dnal_dist.training.usage import Clock


@spanned("prune")
def prune(run: Run) -> None:
    """Select the channels to keep and make the network physically smaller; without a search, take what another run kept."""
    recipe, supernet, clock, target = run.recipe, run.supernet, Clock(run), run.budget
    run.log.begin("prune", 3, 0)
    run.log.progress(0, "selecting channels")
    image_size, settings = recipe.data.image_size, recipe.architecture
    if run.given is not None:
        keep, rescued, collapsed, selected_by = run.given.keep, [], False, {}
    elif target is None:
        (keep, rescued, collapsed), selected_by = select_by_gates(run), {"threshold": settings.threshold}
    else:
        keep, rescued, collapsed = select_by_budget(run, target), [], False
        selected_by = budgets_met(run, target, keep)
    run.context.agree("alpha", supernet.by_site(run.architecture.alpha.detach()))
    run.context.agree("the keep mask", supernet.by_site(keep))
    with span("compaction"):
        run.compact = compact.compact(supernet, keep) if run.given is None else run.given.network.to(run.context.device)
        run.state.mask = masks.pack(keep)
    run.momentum = {}
    supernet.cpu()
    if run.given is None:
        recalibrate(run, settings.recalibration_batches)
    full, small = cost.both_rules(supernet, image_size), cost.both_rules(supernet, image_size, keep)
    present = masks.present(supernet, keep)
    kept = {site: int(part.sum()) for site, part in supernet.by_site(present).items()}
    layers = cost.of_layers(supernet, image_size, keep)
    facts = {"layers": layers, "rescued": rescued, "collapsed": collapsed, "mask": run.state.mask}
    run.log.record("prune", kept=kept, full=full, compact=small, **selected_by, **facts)
    accuracy = evaluate_and_record(run, epoch=0.0, ends_phase=True)
    clock.record()
    run.log.record("phase", phase="prune", **usage.summary(run.state, "prune"), breakdown=run.breakdown.so_far())
    fraction = small["exact"]["macs"] / full["exact"]["macs"]
    run.log.finish(f"val {accuracy:.2%}  {int(present.sum())} of {len(present)} channels  {fraction:.1%} of the MACs")


@torch.no_grad()
def recalibrate(run: Run, number: int) -> None:
    """Reset the running statistics of the compact network's BatchNorms to plain means over `number` batches, the first ones of the
    finetune: those of the search belong to gates that were still soft. 0 keeps them."""
    norms = [module for module in run.compact.modules() if isinstance(module, _BatchNorm)]
    if not number or not norms:
        return
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    run.compact.train()
    with contextlib.closing(training_batches(run, fill=False)) as batches:
        for done in range(number):
            run.log.doing("recalibration", done, number)
            run.compact(next(batches).images)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


def select_by_gates(run: Run) -> tuple[Tensor, list[str], bool]:
    """The keep mask of the open gates, the sites that had to be rescued, and whether the architecture had collapsed."""
    settings, supernet = run.recipe.architecture, run.supernet
    keep = run.architecture.keep(settings.delta_final, settings.threshold).cpu()
    alpha = run.architecture.alpha.detach().cpu()
    keep, rescued = masks.rescue(supernet, keep, alpha)
    if rescued:
        run.log.warn(f"all channels of {', '.join(rescued)} closed; the strongest one of each stays")
    keep, collapsed = selection.reopen(supernet, run.recipe.data.image_size, keep, alpha, settings.min_macs)
    keep = budgets.rounded(supernet, keep, alpha, settings.round_to)
    if collapsed:
        run.log.warn(
            f"the architecture collapsed: less than {settings.min_macs:.1%} of the MACs were left, so the channels "
            f"closest to staying were opened again; lower architecture.penalty_weight ({settings.penalty_weight:g})"
        )
    if keep.all():
        run.log.warn(f"no channel closed; raise architecture.penalty_weight ({settings.penalty_weight:g})")
    return keep, rescued, collapsed


def select_by_budget(run: Run, target: budgets.Budget) -> Tensor:
    """The keep mask of the strongest channels that meet the budget exactly."""
    image_size, settings = run.recipe.data.image_size, run.recipe.architecture

    strength = run.architecture.alpha
    if run.architecture.hard:
        strength = taylor.strength(run.supernet, image_size, run.architecture, target)

    def choose(budget: budgets.Budget) -> Tensor:
        if run.architecture.hard:
            return taylor.select(run.supernet, image_size, strength, budget, taylor.ROUNDS, settings)
        return selection.select(run.supernet, image_size, strength, budget, settings.round_to)

    if target.latency is None or not settings.target.measured:
        return choose(target)
    keep, run.state.latency_factor = timed.select(run, choose, target, strength)
    return keep


def budgets_met(run: Run, target: budgets.Budget, keep: Tensor) -> dict:
    """What the record of pruning holds of the budgets; a warning if they are missed."""
    image_size, factor = run.recipe.data.image_size, run.state.latency_factor
    rows = predicted = target.records(run.supernet, image_size, keep)
    if factor is not None:
        target = target.corrected(factor, budgets.MEASURED)
        rows = target.records(run.supernet, image_size, keep)
        for row, before in zip(rows, predicted, strict=True):
            if row["unit"] == "latency":
                row["predicted"] = before["used"]
    if message := target.missed(run.supernet, image_size, keep):
        run.log.warn(message)
    return {"budget": rows[0], "further_budgets": rows[1:] or None}
