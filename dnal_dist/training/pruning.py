"""From the supernet to the compact network, between the search and the finetune."""

import contextlib

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.common.span import span, spanned
from dnal_dist.nets import compact, cost, masks
from dnal_dist.search import selection
from dnal_dist.training import usage
from dnal_dist.training.loop import fed, look
from dnal_dist.training.run import Run
from dnal_dist.training.stopping import Stopped
from dnal_dist.training.usage import Clock


@spanned("prune")
def prune(run: Run) -> None:
    """Decide which channels stay and make the network physically smaller."""
    recipe, supernet, clock = run.recipe, run.supernet, Clock(run)
    image_size, settings = recipe.data.image_size, recipe.architecture
    target = run.budget
    keep, rescued, collapsed = choose_by_gates(run) if target is None else (choose_by_budget(run, target), [], False)
    run.context.agree("alpha", supernet.by_site(run.architecture.alpha.detach()))
    run.context.agree("the keep mask", supernet.by_site(keep))
    with span("compaction"):
        run.small, run.mask = compact.compact(supernet, keep), masks.pack(keep)
    run.momentum = {}
    supernet.cpu()
    recalibrate(run, settings.recalibration_batches)
    full, small = cost.both_rules(supernet, image_size), cost.both_rules(supernet, image_size, keep)
    present = masks.present(supernet, keep)
    kept = {site: int(part.sum()) for site, part in supernet.by_site(present).items()}
    chosen_by = {"threshold": settings.threshold} if target is None else {"budget": target._asdict()}
    layers = cost.of_layers(supernet, image_size, keep)
    facts = {"layers": layers, "rescued": rescued, "collapsed": collapsed, "mask": run.mask}
    run.log.record("prune", kept=kept, full=full, compact=small, **chosen_by, **facts)
    try:
        accuracy = look(run, epoch=0.0)
    except Stopped as stopped:
        # What it goes on from is the checkpoint before: pruning is done again.
        run.log.record("stop", phase="prune", step=0, reason=str(stopped))
        raise
    clock.tell()
    run.log.record("phase", phase="prune", **usage.told(run, "prune"))
    share = small["exact"]["macs"] / full["exact"]["macs"]
    run.log.begin("prune", 1, 1)
    run.log.finish(f"accuracy {accuracy:.2%}  {int(present.sum())} of {len(present)} channels  {share:.1%} of the MACs")


@torch.no_grad()
def recalibrate(run: Run, number: int) -> None:
    """Take the running statistics of the compact network's BatchNorms anew: their plain means over `number` batches, the first ones
    of the finetune. Those of the search are of gates that were still soft. 0 leaves them as they are."""
    norms = [module for module in run.small.modules() if isinstance(module, _BatchNorm)]
    if not number or not norms:
        return
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    run.small.train()
    with contextlib.closing(fed(run, fill=False)) as batches:
        for _ in range(number):
            run.small(next(batches).images)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


def choose_by_gates(run: Run) -> tuple[Tensor, list[str], bool]:
    """The channels whose gates are open, the sites that had to be rescued, and whether the architecture had collapsed."""
    settings, supernet = run.recipe.architecture, run.supernet
    keep = run.architecture.keep(settings.delta_final, settings.threshold).cpu()
    alpha = run.architecture.alpha.detach().cpu()
    keep, rescued = masks.rescue(supernet, keep, alpha)
    if rescued:
        run.log.warn(f"all channels of {', '.join(rescued)} closed; the strongest one of each stays")
    keep, collapsed = selection.reopen(supernet, run.recipe.data.image_size, keep, alpha, settings.min_macs)
    if collapsed:
        run.log.warn(
            f"the architecture collapsed: less than {settings.min_macs:.1%} of the MACs were left, so the channels "
            f"closest to staying were opened again; lower architecture.penalty_weight ({settings.penalty_weight:g})"
        )
    if keep.all():
        run.log.warn(f"no channel closed; raise architecture.penalty_weight ({settings.penalty_weight:g})")
    return keep, rescued, collapsed


def choose_by_budget(run: Run, target: selection.Budget) -> Tensor:
    """The strongest channels that meet the budget exactly; a warning if none were found that do."""
    image_size = run.recipe.data.image_size
    keep = selection.select(run.supernet, image_size, run.architecture.alpha, target)
    if (found := target.of(cost.count(run.supernet, image_size, keep))) not in target:
        run.log.warn(target.missed(found))
    return keep
