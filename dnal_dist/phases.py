"""The phases of a run: pretrain, search, prune, finetune."""

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist import budget, checkpoint, compact, cost, schedule
from dnal_dist.architecture import Architecture
from dnal_dist.backends import Trained
from dnal_dist.evaluate import evaluate
from dnal_dist.feed import Fed, feed
from dnal_dist.meter import Meter, check_finite, check_skipped
from dnal_dist.nets import GatedNetwork
from dnal_dist.parallel import Parallel
from dnal_dist.receipts import Receipt
from dnal_dist.recipe import InputError, Recipe
from dnal_dist.steps import Outcome, architecture_step, weight_step
from dnal_dist.stream import Stream
from dnal_dist.track import Track

# Architecture steps between two looks at the expected cost by the collapse guard.
GUARD_EVERY = 10


@dataclass
class Run:
    """Everything a run works with, and where it stands."""

    recipe: Recipe
    folder: Path
    parallel: Parallel
    track: Track
    train: Stream
    val: Stream
    supernet: GatedNetwork
    """The gated network; on the CPU once it is pruned."""
    architecture: Architecture
    phase: str = "pretrain"
    step: int = 0
    """Iterations of the phase that lie behind."""
    global_step: int = 0
    """Iterations of the run that lie behind; also the position in the stream of batches."""
    penalty_rests: bool = False
    """The collapse guard has switched the penalty off."""
    penalty_weight: float | None = None
    """Of the last architecture step of a search that is after a budget, and the state of the loop that drives it."""
    penalty_lag: float = 0.0
    momentum: dict[str, Tensor] = field(default_factory=dict)
    """Of the weights, by name, to start the next optimiser with."""
    skipped: set[str] = field(default_factory=set)
    """Samples that could not be used and have been named."""
    receipt: Receipt = field(default_factory=Receipt)
    """Of the pass over the training set that is under way."""
    small: nn.Module | None = None
    """The compact network, once there is one."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the phases that lie behind."""

    def __post_init__(self):
        settings = self.recipe.architecture.optimizer
        self.architecture_optimizer = torch.optim.SGD(
            self.architecture.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
        )

    @property
    def network(self) -> nn.Module:
        """The bare network that trains now."""
        return self.supernet if self.small is None else self.small


def go(run: Run) -> None:
    """From where `run` stands to its end."""
    batches = fed(run)
    try:
        if run.phase == "pretrain":
            pretrain(run, batches)
        if run.phase == "search":
            search(run, batches)
        if run.phase == "prune":
            # A stream has one reader at a time, and pruning looks at batches that the finetune will see again.
            batches.close()
            prune(run)
            batches = fed(run)
        if run.phase == "finetune":
            finetune(run, batches)
    finally:
        batches.close()


def fed(run: Run, fill: bool = True) -> Generator[Fed]:
    """The training batches from where `run` stands on, on its device; in full size even if samples had to be skipped."""
    share = run.recipe.data.global_batch // run.parallel.world_size
    return feed(run.train.batches(run.global_step), run.recipe.data, run.parallel.device, share if fill else 0)


def pretrain(run: Run, batches) -> None:
    """Weights only, without gates; not at all if the recipe gives it no iterations."""
    given = run.recipe.model.init_from
    if given and run.step == 0:
        run.track.say(f"accuracy {look(run, epoch=0.0):.2%} with the weights of {given}")
    if run.recipe.phases.pretrain.iterations(run.train.steps_per_epoch):
        optimise(run, batches)
    _enter(run, "search")


def search(run: Run, batches) -> None:
    """Weights and architecture in turn, while delta grows and the gates harden."""
    settings, phase = run.recipe.architecture, run.recipe.phases.search
    total = phase.iterations(run.train.steps_per_epoch)
    penalty = Penalty(run, total)

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
            penalty.weight(delta, step),
            run.parallel.average_,
            penalty.share,
            parts,
            settings.optimizer.clip_norm,
        )

    if run.step == 0:
        record_gates(run, settings.delta_start)
    optimise(run, batches, step_either)
    assert run.step == total
    _enter(run, "prune")


def prune(run: Run) -> None:
    """Decide which channels stay and make the network physically smaller."""
    recipe, supernet = run.recipe, run.supernet
    image_size, settings = recipe.data.image_size, recipe.architecture
    target = budget.budget(settings, supernet, image_size)
    keep, rescued, collapsed = choose_by_gates(run) if target is None else (choose_by_budget(run, target), [], False)
    run.parallel.agree("alpha", supernet.by_site(run.architecture.alpha.detach()))
    run.parallel.agree("the keep mask", supernet.by_site(keep))
    run.small = compact.compact(supernet, keep)
    run.momentum = {}
    supernet.cpu()
    recalibrate(run, settings.recalibration_batches)
    full, small = cost.both_rules(supernet, image_size), cost.both_rules(supernet, image_size, keep)
    present = cost.present(supernet, keep)
    kept = {site: int(part.sum()) for site, part in supernet.by_site(present).items()}
    chosen_by = {"threshold": settings.threshold} if target is None else {"budget": target._asdict()}
    facts = {"rescued": rescued, "collapsed": collapsed, "mask": cost.pack(keep)}
    run.track.record("prune", kept=kept, full=full, compact=small, **chosen_by, **facts)
    accuracy = look(run, epoch=0.0)
    share = small["exact"]["macs"] / full["exact"]["macs"]
    run.track.begin("prune", 1, 1)
    run.track.finish(f"accuracy {accuracy:.2%}  {int(present.sum())} of {len(present)} channels  {share:.1%} of the multiply-adds")
    _enter(run, "finetune")


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
    keep, rescued = compact.rescue(supernet, keep, alpha)
    if rescued:
        run.track.warn(f"all channels of {', '.join(rescued)} closed; the strongest one of each stays")
    keep, collapsed = compact.reopen(supernet, run.recipe.data.image_size, keep, alpha, settings.min_macs)
    if collapsed:
        run.track.warn(
            f"the architecture collapsed: less than {settings.min_macs:.1%} of the multiply-adds were left, so the channels "
            f"closest to staying were opened again; lower architecture.penalty_weight ({settings.penalty_weight:g})"
        )
    if keep.all():
        run.track.warn(f"no channel closed; raise architecture.penalty_weight ({settings.penalty_weight:g})")
    return keep, rescued, collapsed


def choose_by_budget(run: Run, target: budget.Budget) -> Tensor:
    """The strongest channels that meet the budget exactly; a warning if none were found that do."""
    image_size = run.recipe.data.image_size
    keep = budget.select(run.supernet, image_size, run.architecture.alpha, target)
    if (found := target.of(cost.count(run.supernet, image_size, keep))) not in target:
        run.track.warn(target.missed(found))
    return keep


def finetune(run: Run, batches) -> None:
    """The compact network, on its own."""
    optimise(run, batches)
    if run.global_step % run.train.steps_per_epoch:
        write_receipt(run)
    if run.parallel.main:
        facts = {"name": run.recipe.model.name, "image_size": run.recipe.data.image_size}
        data = {"mean": run.recipe.data.mean, "std": run.recipe.data.std}
        try:
            compact.save(run.small, run.folder / "compact", **facts, **data)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{run.folder / 'compact'}: cannot be written ({error}); make room, then use --resume", local=True
            ) from None
    _enter(run, "done")


def without_gates(trained: Trained, step: int, images: Tensor, labels: Tensor, share: int, parts: int) -> Outcome:
    return weight_step(trained, images, labels, share, parts=parts)


def optimise(run: Run, batches, do: Callable[..., Outcome] = without_gates) -> None:
    """Take the iterations of the current phase that are left, evaluating and saving at each epoch's end.

    `do(trained, step, images, labels, share, parts)` takes one of them.
    """
    recipe, parallel, track = run.recipe, run.parallel, run.track
    phase = getattr(recipe.phases, run.phase)
    per_epoch = run.train.steps_per_epoch
    total = phase.iterations(per_epoch)
    share, parts = recipe.data.global_batch // parallel.world_size, parallel.parts(recipe.data)
    trained = parallel.wrap(run.network, phase.optimizer, run.momentum, recipe.training)
    meter, result = Meter(run), ""
    begun, before = time.monotonic(), run.seconds.get(run.phase, 0.0)
    track.begin(run.phase, total, run.step)
    while run.step < total:
        rate = schedule.learning_rate_at(phase, run.step, per_epoch)
        trained.set_rate(rate)
        images, labels = meter.next(batches)
        with meter.listen():
            outcome = do(trained, run.step, images, labels, share, parts)
        meter.add(outcome)
        run.step += 1
        run.global_step += 1
        if run.global_step % per_epoch == 0:
            write_receipt(run)
        epoch = run.step / per_epoch
        ends_epoch = run.step % per_epoch == 0 or run.step == total
        if run.step % recipe.tracking.log_every == 0 or ends_epoch:
            result = meter.log(rate, total, epoch)
            if run.step < total:
                track.progress(run.step, result)
        if ends_epoch:
            with meter.pause(), trained.gathered() as momentum:
                accuracy = look(run, epoch)
                result = f"accuracy {accuracy:.2%}  {meter.summary}"
                run.momentum = {name: buffer.cpu() for name, buffer in momentum.items()}
                run.seconds[run.phase] = before + time.monotonic() - begun
                if run.step < total:
                    track.progress(run.step, result)
                    save(run)
    trained.close()
    track.finish(f"{result}  {run.seconds[run.phase]:.0f} s")
    track.record("phase", phase=run.phase, seconds=round(run.seconds[run.phase], 3))


def delta_of(run: Run, step: int) -> float:
    """Hardness of the gates in the search's iteration after `step` others."""
    return schedule.delta_at(run.recipe.phases.search, run.recipe.architecture, step, run.train.steps_per_epoch)


class Penalty:
    """The penalty weight of each architecture step: the recipe's, or what the budget asks for."""

    def __init__(self, run: Run, steps: int):
        self.run, self.steps = run, steps
        settings, net, image_size = run.recipe.architecture, run.supernet, run.recipe.data.image_size
        self.budget = budget.budget(settings, net, image_size)
        unit = "macs" if self.budget is None else self.budget.unit
        full = getattr(cost.count(net, image_size), unit)
        self.share = lambda gates: getattr(cost.expected(net, image_size, gates), unit) / full
        if self.budget is not None:
            phase = run.recipe.phases.search
            taken = steps * phase.architecture_steps / (phase.weight_steps + phase.architecture_steps)
            self.loop = budget.Loop(self.budget, settings, self.share, run.architecture, taken)

    def weight(self, delta: float, step: int) -> float:
        """Of the search's iteration `step`; moves the state that the run keeps of it."""
        run, phase = self.run, self.run.recipe.phases.search
        if self.budget is not None:
            run.penalty_weight, run.penalty_lag = self.loop.weight(delta, step / self.steps, run.penalty_lag)
            return run.penalty_weight
        if (step // (phase.weight_steps + phase.architecture_steps)) % GUARD_EVERY == 0:
            self._guard(delta)
        return 0.0 if run.penalty_rests else run.recipe.architecture.penalty_weight

    @torch.no_grad()
    def _guard(self, delta: float) -> None:
        """Let the penalty rest while hardened gates leave less than the recipe's floor of multiply-adds, and say so.

        Soft gates tell nothing yet: all of them may be small together, since the next BatchNorm takes that out again.
        """
        run, settings = self.run, self.run.recipe.architecture
        gates = run.architecture.gates(delta)
        hardened = float((4 * gates * (1 - gates)).mean()) < 0.1
        share = float(self.share(gates))
        collapsing = hardened and share < settings.min_macs
        if collapsing and not run.penalty_rests:
            run.track.global_step = run.global_step
            run.track.warn(
                f"the architecture is collapsing: {share:.2%} of the multiply-adds are left, architecture.min_macs is "
                f"{settings.min_macs:.1%}; the penalty rests. Lower architecture.penalty_weight ({settings.penalty_weight:g})"
            )
        run.penalty_rests = collapsing


def look(run: Run, epoch: float) -> float:
    """Evaluate the current network on the validation set, record it and return its accuracy."""
    run.track.global_step = run.global_step
    run.parallel.average_statistics(run.network)
    gates = None
    if run.phase == "search":
        delta = delta_of(run, run.step - 1)
        run.parallel.agree("alpha", run.supernet.by_site(run.architecture.alpha.detach()))
        run.parallel.agree("the hardness of the gates", {"delta": torch.tensor(delta, dtype=torch.float64)})
        gates = run.architecture.gates(delta).detach()
        record_gates(run, delta)
    found = evaluate(run.network, run.val, run.recipe.data, run.parallel, gates)
    check_skipped(run, found.bad, run.val, "data.val")
    check_finite(run, found.cross_entropy)
    values = {k: round(v, 6) for k, v in found._asdict().items() if k != "bad"}
    run.track.record("eval", phase=run.phase, step=run.step, epoch=round(epoch, 4), **values)
    return found.accuracy


def record_gates(run: Run, delta: float) -> None:
    run.track.global_step = run.global_step
    gates = run.architecture.gates(delta).detach().cpu()
    kept = gates > run.recipe.architecture.threshold
    run.track.record(
        "gates",
        phase="search",
        step=run.step,
        epoch=round(run.step / run.train.steps_per_epoch, 4),
        delta=delta,
        histogram=torch.histc(gates, 20, 0, 1).int().tolist(),
        open={site: int(part.sum()) for site, part in run.supernet.by_site(kept).items()},
    )


def write_receipt(run: Run) -> None:
    """Record what was consumed of the epoch that ends here, or of its part that the run came to."""
    settle(run)
    run.track.global_step = run.global_step
    run.track.record("receipt", **run.receipt.packed())
    run.receipt = Receipt()


def settle(run: Run) -> None:
    run.receipt.settle(run.parallel.gather, run.parallel.main, run.global_step, run.train.steps_per_epoch)


def save(run: Run) -> None:
    """A checkpoint of where `run` stands."""
    settle(run)
    checkpoint.save(run)


def _enter(run: Run, phase: str) -> None:
    """Begin `phase`, from a checkpoint on."""
    run.phase, run.step = phase, 0
    save(run)
