"""The phases of a run: pretrain, search, prune, finetune."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dnal_dist import checkpoint, compact, cost, schedule
from dnal_dist.architecture import Architecture
from dnal_dist.checkpoint import Checkpoint
from dnal_dist.evaluate import evaluate
from dnal_dist.nets import GatedNetwork
from dnal_dist.parallel import Parallel
from dnal_dist.recipe import Recipe
from dnal_dist.steps import Outcome, architecture_step, weight_step
from dnal_dist.stream import DataError, Stream, normalise
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
    """The gated network; not on the device any more once it is pruned."""
    architecture: Architecture
    phase: str = "pretrain"
    step: int = 0
    """Iterations of the phase that lie behind."""
    global_step: int = 0
    """Iterations of the run that lie behind; also the position in the stream of batches."""
    penalty_rests: bool = False
    """The collapse guard has switched the penalty off."""
    momentum: dict[str, Tensor] = field(default_factory=dict)
    """Of the weights, by name, to start the next optimiser with."""
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
    batches = run.train.batches(run.global_step)
    try:
        if run.phase == "pretrain":
            pretrain(run, batches)
        if run.phase == "search":
            search(run, batches)
        if run.phase == "prune":
            prune(run)
        if run.phase == "finetune":
            finetune(run, batches)
    finally:
        batches.close()


def pretrain(run: Run, batches) -> None:
    """Weights only, without gates."""
    optimise(run, batches, lambda step, images, labels, weights: weights(images, labels, None))
    _enter(run, "search")


def search(run: Run, batches) -> None:
    """Weights and architecture in turn, while delta grows and the gates harden."""
    settings, phase = run.recipe.architecture, run.recipe.phases.search
    total = phase.iterations(run.train.steps_per_epoch)
    full_macs = cost.count(run.supernet, run.recipe.data.image_size).macs

    def step_either(step, images, labels, weights) -> Outcome:
        delta = delta_at(run.recipe, step, run.train.steps_per_epoch)
        if not schedule.is_architecture_step(step, phase.weight_steps, phase.architecture_steps):
            return weights(images, labels, run.architecture.gates(delta))
        if (step // (phase.weight_steps + phase.architecture_steps)) % GUARD_EVERY == 0:
            guard(run, delta, full_macs)
        return architecture_step(
            run.supernet,
            run.architecture,
            run.architecture_optimizer,
            images,
            labels,
            run.recipe.data.global_batch // run.parallel.world_size,
            delta,
            settings.penalty,
            0.0 if run.penalty_rests else settings.penalty_weight,
            run.parallel.average_,
        )

    if run.step == 0:
        record_gates(run, settings.delta_start)
    optimise(run, batches, step_either)
    run.parallel.assert_equal(run.architecture.alpha, "alpha")
    assert run.step == total
    _enter(run, "prune")


def prune(run: Run) -> None:
    """Decide which channels stay and make the network physically smaller."""
    recipe, supernet = run.recipe, run.supernet
    image_size, settings = recipe.data.image_size, recipe.architecture
    keep = run.architecture.keep(settings.delta_final, settings.threshold).cpu()
    alpha = run.architecture.alpha.detach().cpu()
    keep, rescued = compact.rescue(supernet, keep, alpha)
    if rescued:
        run.track.warn(f"all channels of {', '.join(rescued)} closed; the strongest one of each stays")
    keep, collapsed = reopen(supernet, image_size, keep, alpha, settings.min_macs)
    if collapsed:
        run.track.warn(
            f"the architecture collapsed: less than {settings.min_macs:.1%} of the multiply-adds were left, so the channels "
            f"closest to staying were opened again; lower architecture.penalty_weight ({settings.penalty_weight:g})"
        )
    if keep.all():
        run.track.warn(f"no channel closed; raise architecture.penalty_weight ({settings.penalty_weight:g})")
    run.small = compact.compact(supernet, keep).to(run.parallel.device)
    run.momentum = {}
    full, small = cost.both_rules(supernet, image_size), cost.both_rules(supernet, image_size, keep)
    kept = {site: int(part.sum()) for site, part in supernet.by_site(keep).items()}
    run.track.record(
        "prune", kept=kept, threshold=settings.threshold, full=full, compact=small, rescued=rescued, collapsed=collapsed
    )
    accuracy = look(run, epoch=0.0)
    share = small["exact"]["macs"] / full["exact"]["macs"]
    run.track.begin("prune", 1, 1)
    run.track.finish(f"accuracy {accuracy:.2%}  {int(keep.sum())} of {len(keep)} channels  {share:.1%} of the multiply-adds")
    _enter(run, "finetune")


def finetune(run: Run, batches) -> None:
    """The compact network, on its own."""
    optimise(run, batches, lambda step, images, labels, weights: weights(images, labels, None))
    if run.parallel.main:
        facts = {"name": run.recipe.model.name, "image_size": run.recipe.data.image_size}
        data = {"mean": run.recipe.data.mean, "std": run.recipe.data.std}
        compact.save(run.small, run.folder / "compact", **facts, **data)
    _enter(run, "done")


def optimise(run: Run, batches, do: Callable[..., Outcome]) -> None:
    """Take the iterations of the current phase that are left, evaluating and saving at each epoch's end.

    `do(step, images, labels, weights)` takes one of them; `weights(images, labels, gates)` is the weight step.
    """
    recipe, parallel, track = run.recipe, run.parallel, run.track
    phase = getattr(recipe.phases, run.phase)
    per_epoch = run.train.steps_per_epoch
    total = phase.iterations(per_epoch)
    share = recipe.data.global_batch // parallel.world_size
    network, optimizer = weights_of(run, phase.optimizer)
    meter, begun, result = Meter(run), time.monotonic(), ""
    track.begin(run.phase, total, run.step)

    def weights(images: Tensor, labels: Tensor, gates: Tensor | None) -> Outcome:
        return weight_step(network, optimizer, images, labels, share, parallel.backward, gates)

    while run.step < total:
        rate = learning_rate_at(phase, run.step, per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, labels = meter.next(batches)
        meter.add(do(run.step, images, labels, weights))
        run.step += 1
        run.global_step += 1
        epoch = run.step / per_epoch
        if run.step % recipe.tracking.log_every == 0 or run.step == total:
            result = meter.log(rate, total, epoch)
            track.progress(run.step, result)
        if run.step % per_epoch == 0 or run.step == total:
            with meter.pause():
                accuracy = look(run, epoch)
                result = f"accuracy {accuracy:.2%}  {meter.summary}"
                track.progress(run.step, result)
                run.momentum = checkpoint.momentum(run.network, optimizer)
                if run.step < total:
                    save(run)
    run.seconds[run.phase] = run.seconds.get(run.phase, 0.0) + time.monotonic() - begun
    track.finish(f"{result}  {run.seconds[run.phase]:.0f} s")
    track.record("phase", phase=run.phase, seconds=round(run.seconds[run.phase], 3))


def weights_of(run: Run, settings):
    """The current network wrapped for training and its SGD, which goes on with the momentum there is."""
    optimizer = torch.optim.SGD(
        run.network.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
    )
    checkpoint.restore_momentum(run.network, optimizer, run.momentum)
    return run.parallel.wrap(run.network, optimizer)


def learning_rate_at(phase, step: int, per_epoch: int) -> float:
    """Learning rate of the iteration after `step` others; positions are in the unit of the phase's duration."""
    if phase.epochs is None:
        return schedule.learning_rate(phase.schedule, phase.optimizer.lr, step, phase.steps)
    return schedule.learning_rate(phase.schedule, phase.optimizer.lr, step / per_epoch, phase.epochs)


def delta_at(recipe: Recipe, step: int, per_epoch: int) -> float:
    """Hardness of the gates in the search's iteration after `step` others: it grows once an epoch, or once a step if the
    search's duration is in steps."""
    phase, settings = recipe.phases.search, recipe.architecture
    k, count = (step, phase.steps) if phase.epochs is None else (step // per_epoch, int(phase.epochs))
    return schedule.delta(settings.delta_start, settings.delta_final, min(k, count - 1), count)


def guard(run: Run, delta: float, full_macs: int) -> None:
    """Let the penalty rest while the expected multiply-adds are below the recipe's floor, and say so."""
    floor = run.recipe.architecture.min_macs
    with torch.no_grad():
        gates = run.architecture.gates(delta)
        share = float(cost.expected_macs(run.supernet, run.recipe.data.image_size, gates)) / full_macs
    if share < floor and not run.penalty_rests:
        run.track.warn(
            f"the architecture is collapsing: {share:.1%} of the multiply-adds are left, the floor is {floor:.1%} "
            f"(architecture.min_macs); the penalty rests. Lower architecture.penalty_weight "
            f"({run.recipe.architecture.penalty_weight:g})"
        )
    run.penalty_rests = share < floor


def reopen(net: GatedNetwork, image_size: int, keep: Tensor, alpha: Tensor, floor: float) -> tuple[Tensor, bool]:
    """`keep` with as many channels opened again, largest alpha first, as bring the multiply-adds to the share `floor`; and whether
    any had to be."""
    least = floor * cost.count(net, image_size).macs
    ranked = alpha.argsort(descending=True, stable=True)

    def with_first(number: int) -> Tensor:
        mask = keep.clone()
        mask[ranked[:number]] = True
        return mask

    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost.count(net, image_size, with_first(middle)).macs >= least else (middle + 1, high)
    return with_first(low), low > 0


def look(run: Run, epoch: float) -> float:
    """Evaluate the current network on the validation set, record it and return its accuracy."""
    run.track.global_step = run.global_step
    run.parallel.average_statistics(run.network)
    gates = None
    if run.phase == "search":
        run.parallel.assert_equal(run.architecture.alpha, "alpha")
        delta = delta_at(run.recipe, run.step - 1, run.train.steps_per_epoch)
        gates = run.architecture.gates(delta).detach()
        record_gates(run, delta)
    found = evaluate(run.network, run.val, run.recipe.data, run.parallel, gates)
    refuse_too_many_bad(run, found.bad, run.val, "data.val")
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


def refuse_too_many_bad(run: Run, bad: list[str], stream: Stream, key: str) -> None:
    """Warn about pictures that were skipped in a pass over `stream`; raise DataError beyond the recipe's share of them."""
    if not bad:
        return
    named = "; ".join(bad[:3]) + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
    limit = run.recipe.data.max_bad_fraction
    if len(bad) > limit * stream.samples:
        raise DataError(
            f"{named}: {len(bad)} of {stream.samples} pictures of {key} cannot be decoded, the limit "
            f"data.max_bad_fraction is {limit:g}; mend the shards or raise it"
        )
    run.track.warn(f"{len(bad)} of {stream.samples} pictures of {key} skipped: {named}")


class Meter:
    """Sums over the iterations since the last record; one collective when they are told."""

    def __init__(self, run: Run):
        self.run, self.summary = run, ""
        self.bad: list[str] = []
        self._start_over()

    def _start_over(self) -> None:
        # cross-entropy, correct, pictures, penalty, architecture steps, pictures skipped
        self.sums = torch.zeros(6, dtype=torch.float64, device=self.run.parallel.device)
        self.since, self.waited, self.paused = time.monotonic(), 0.0, 0.0

    def next(self, batches) -> tuple[Tensor, Tensor]:
        """The next batch, on the device and normalised."""
        if self.run.global_step % self.run.train.steps_per_epoch == 0:
            self.bad = []
        asked = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - asked
        self.bad += batch.bad
        self.sums[5] += len(batch.bad)
        self.sums[2] += len(batch.labels)
        device, data = self.run.parallel.device, self.run.recipe.data
        images = normalise(batch.images.to(device, non_blocking=True), data.mean, data.std)
        return images, batch.labels.to(device, non_blocking=True)

    def add(self, outcome: Outcome) -> None:
        self.sums[0] += outcome.cross_entropy
        self.sums[1] += outcome.correct
        if outcome.penalty is not None:
            self.sums[3] += outcome.penalty
            self.sums[4] += 1

    def pause(self):
        return _Pause(self)

    def log(self, rate: float, total: int, epoch: float) -> str:
        """Record the means since the last time and return them as text. Raises DataError if too many pictures were skipped."""
        run, parallel = self.run, self.run.parallel
        run.track.global_step = run.global_step
        cross_entropy, correct, pictures, penalty, penalties, bad = parallel.sum_(self.sums).tolist()
        if bad:
            refuse_too_many_bad(run, parallel.gather(self.bad), run.train, "data.train")
        pictures = max(pictures, 1)
        cross_entropy, accuracy = cross_entropy / pictures, correct / pictures
        penalty = penalty / penalties if penalties else None
        seconds = time.monotonic() - self.since - self.paused
        values = {
            "loss": round(cross_entropy + (penalty or 0.0), 6),
            "cross_entropy": round(cross_entropy, 6),
            "accuracy": round(accuracy, 6),
            "learning_rate": rate,
            "images_per_second": round(pictures / seconds, 1),
            "data_wait_seconds": round(self.waited, 4),
            "bad_samples": int(bad),
        }
        self.summary = f"loss {values['loss']:.4f}"
        if run.phase == "search":
            values |= {"penalty": penalty} | self._gates()
            self.summary += f"  open {values['open_share']:.1%}"
        run.track.record(
            "train", phase=run.phase, step=run.step, phase_steps=total, epoch=round(epoch, 4), **values
        )
        text = f"{self.summary}  {values['images_per_second']:.0f} images/s"
        self._start_over()
        return text

    @torch.no_grad()
    def _gates(self) -> dict[str, float]:
        run = self.run
        delta = delta_at(run.recipe, run.step - 1, run.train.steps_per_epoch)
        gates = run.architecture.gates(delta)
        expected = cost.expected_macs(run.supernet, run.recipe.data.image_size, gates)
        kept = (gates > run.recipe.architecture.threshold).float().mean()
        return {"delta": delta, "open_share": round(float(kept), 6), "expected_macs": round(float(expected))}


class _Pause:
    """Time that does not count as training."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def __enter__(self) -> None:
        self.begun = time.monotonic()

    def __exit__(self, *_) -> None:
        self.meter.paused += time.monotonic() - self.begun


def _enter(run: Run, phase: str) -> None:
    run.phase, run.step = phase, 0
    save(run)


def save(run: Run) -> None:
    """Write a checkpoint of where the run stands."""
    if not run.parallel.main:
        return
    tensors = {f"network.{name}": tensor for name, tensor in run.network.state_dict().items()}
    tensors |= {f"momentum.{name}": tensor for name, tensor in run.momentum.items()}
    tensors["alpha"] = run.architecture.alpha
    state = run.architecture_optimizer.state.get(run.architecture.alpha, {})
    if state.get("momentum_buffer") is not None:
        tensors["alpha_momentum"] = state["momentum_buffer"]
    position = {key: getattr(run, key) for key in ("phase", "step", "global_step", "penalty_rests", "seconds")}
    small = None if run.small is None else compact.describe(run.small)
    facts = {"compact": small, "recipe": run.recipe.model_dump(mode="json")}
    checkpoint.save(run.folder / "checkpoints", Checkpoint(tensors, position | facts))


def restore(run: Run, saved: Checkpoint) -> None:
    """Put `run` where `saved` was."""
    tensors, state = saved
    if state["compact"] is not None:
        run.small = compact.build(state["compact"]).to(run.parallel.device)
    part = {kind: {k.removeprefix(kind): t for k, t in tensors.items() if k.startswith(kind)} for kind in ("network.", "momentum.")}
    run.network.load_state_dict(part["network."])
    run.momentum = part["momentum."]
    with torch.no_grad():
        run.architecture.alpha.copy_(tensors["alpha"])
    if "alpha_momentum" in tensors:
        buffer = tensors["alpha_momentum"].to(run.parallel.device)
        run.architecture_optimizer.state[run.architecture.alpha]["momentum_buffer"] = buffer
    for key in ("phase", "step", "global_step", "penalty_rests", "seconds"):
        setattr(run, key, state[key])
