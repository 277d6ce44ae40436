"""What the iterations since the last record came to: means over all processes, speed, and images that were skipped."""

import contextlib
import math
import time

import torch
from torch import Tensor

from dnal_dist.checkpoint.format import Gathered
from dnal_dist.common.errors import InputError
from dnal_dist.common.span import spanned
from dnal_dist.data.pipeline import Stream
from dnal_dist.distributed.traffic import Traffic
from dnal_dist.nets import cost
from dnal_dist.search import schedule
from dnal_dist.training.steps import Outcome


def check_skipped(run, skipped: list[str], stream: Stream, key: str) -> None:
    """Name skipped samples of `stream` when they are met first; raise InputError beyond the recipe's share."""
    if not skipped:
        return
    new = [image for image in skipped if image not in run.skipped] or skipped
    named = "; ".join(new[:3]) + (f"; and {len(new) - 3} more" if len(new) > 3 else "")
    limit = run.recipe.data.max_bad_fraction
    if len(skipped) > limit * stream.samples:
        raise InputError(
            f"{named}: {len(skipped)} of {stream.samples} samples of {key} cannot be used, more than "
            f"data.max_bad_fraction={limit:g} allows; mend the shards or raise it"
        )
    if not run.skipped.issuperset(skipped):
        run.log.warn(f"skipped {len(skipped)} of {stream.samples} samples of {key}: {named}")
    run.skipped.update(skipped)


def check_finite(run, cross_entropy: float) -> None:
    """Raise InputError if the loss is no number any more; before that is saved."""
    if not math.isfinite(cross_entropy) and run.global_step == 0:
        raise InputError(
            f"key 'model.init_from': with the weights of {run.recipe.model.init_from} the loss on data.val is {cross_entropy}; "
            "give others"
        )
    if not math.isfinite(cross_entropy):
        raise InputError(
            f"the loss is {cross_entropy} in {run.phase} after {run.step} steps; lower phases.{run.phase}.optimizer.lr and go on "
            f"from the last checkpoint, which is from before, by --allow-changed phases.{run.phase} outside of SLURM, or remove "
            "the folder to begin anew"
        )


def total_bytes(sent: int | None, steps: dict[str, int], heard: dict[str, int]) -> int | None:
    """What steps communicated, of which so many of each kind were taken after others that came to `sent`; None if not known."""
    if sent is None or not steps.keys() <= heard.keys():
        return None
    return sent + sum(number * heard[kind] for kind, number in steps.items())


def _peak_memory(device: torch.device) -> int | None:
    """Most bytes that tensors took on a GPU since this was asked last."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class Meter:
    """Sums over the iterations since the last record; one collective when they are told."""

    def __init__(self, run):
        self.run, self.summary = run, ""
        self.skipped: set[str] = set()
        """Images of this phase that did not decode; each counts once, however often it is met."""
        self.bytes: dict[str, int] = {}
        """The least that a step of each kind communicated, of those that were listened to."""
        cycle = run.recipe.phases.search.cycle if run.phase == "search" else 1
        # The very first steps have more to say than all that follow. A compiled step would not compile while it is listened to.
        deaf = run.recipe.training.compile or run.context.backend == "single"
        self.listening, self.heard = 0 if deaf else 3 * cycle, None
        self.steps: dict[str, int] = {}
        """How many steps of each kind these processes took."""
        self.sent: int | None = 0
        """Bytes that steps communicated before, on other processes."""
        self._start_over()
        if run.meter is not None:
            self._go_on(*run.meter)
            run.meter = None

    def _go_on(self, gathered: Gathered, sums: Tensor, same_topology: bool) -> None:
        """What steps communicate is told anew where that may be another number."""
        self.sums += sums.to(self.sums.device)
        self.skipped.update(gathered.skipped)
        self.summary, self.since = gathered.summary, self.since - gathered.seconds
        if same_topology:
            # The first steps after a start say more than others: where it listened still, it listens to as many again.
            self.bytes, self.listening = dict(gathered.bytes), self.listening if gathered.listening else 0
            self.steps, self.sent = dict(gathered.steps), gathered.sent
        else:
            self.sent = total_bytes(gathered.sent, gathered.steps, gathered.bytes)

    def gathered(self) -> Gathered:
        """What there is for the next record so far; `sums` is apart, since each process has its own. All processes come here."""
        skipped = sorted(set(self.run.context.gather(sorted(self.skipped))))
        seconds = time.monotonic() - self.since - self.paused
        sent = {"steps": dict(self.steps), "sent": self.sent}
        return Gathered(summary=self.summary, bytes=self.bytes, listening=self.listening, seconds=seconds, skipped=skipped, **sent)

    def bytes_sent(self) -> int | None:
        """What all steps of the phase so far communicated, by each process; None where nothing was or nobody listened."""
        return total_bytes(self.sent, self.steps, self.bytes) or None

    def _start_over(self) -> None:
        # cross-entropy, correct, images, penalty, architecture steps, images skipped
        self.sums = torch.zeros(6, dtype=torch.float64, device=self.run.context.device)
        self.since, self.waited, self.paused = time.monotonic(), 0.0, 0.0

    def next(self, batches) -> tuple[Tensor, Tensor]:
        """Images and labels of the next batch of a feed."""
        images, labels, batch, waited = next(batches)
        self.waited += waited
        self.skipped.update(map(str, batch.bad))
        self.run.receipt.take(batch.tally, len(batch.labels), batch.bad)
        self.sums[5] += len(batch.bad)
        self.sums[2] += len(batch.labels)
        return images, labels

    @contextlib.contextmanager
    def listen(self):
        """Note what the step in here communicates, while that is still of interest."""
        if not self.listening:
            yield
            return
        self.listening -= 1
        with Traffic() as self.heard:
            yield

    def add(self, outcome: Outcome) -> None:
        self.sums[0] += outcome.cross_entropy
        self.sums[1] += outcome.correct
        kind = f"comm/bytes_{'weight' if outcome.penalty is None else 'architecture'}_step"
        if self.run.context.world_size > 1:
            self.steps[kind] = self.steps.get(kind, 0) + 1
        if self.heard is not None:
            # Not the last: the second step after a start has more to say under DDP, and a resumed run starts anywhere.
            self.bytes[kind], self.heard = min(self.heard.bytes, self.bytes.get(kind, self.heard.bytes)), None
        if outcome.penalty is not None:
            self.sums[3] += outcome.penalty
            self.sums[4] += 1

    @contextlib.contextmanager
    def pause(self):
        """Time in here does not count as training."""
        begun = time.monotonic()
        yield
        self.paused += time.monotonic() - begun

    @spanned("logging")
    def log(self, rate: float, total: int, epoch: float) -> str:
        """Record the means since the last time and return them as text. Raises InputError if the loss is no number any more, or
        too many images were skipped."""
        run = self.run
        run.log.global_step = run.global_step
        cross_entropy, correct, images, penalty, penalties, skipped = run.context.sum_(self.sums).tolist()
        if skipped:
            check_skipped(run, sorted(set(run.context.gather(sorted(self.skipped)))), run.train, "data.train")
        check_finite(run, cross_entropy)
        images = max(images, 1)
        cross_entropy = cross_entropy / images
        # Each process added the same penalty once a step.
        penalty = penalty / penalties if penalties else None
        # A weight in closed loop changes with every step, its sign too, so a sum with it tells nothing.
        driven = run.recipe.architecture.target is not None
        values = {
            "loss": round(cross_entropy + (0.0 if driven else penalty or 0.0), 6),
            "cross_entropy": round(cross_entropy, 6),
            "penalty": penalty,
            "accuracy": round(correct / images, 6),
            "learning_rate": rate,
            "images_per_second": round(images / (time.monotonic() - self.since - self.paused), 1),
            "data_wait_seconds": round(self.waited, 4),
            "bad_samples": int(skipped),
            "device_memory_bytes": _peak_memory(run.context.device),
            **self.bytes,
        }
        self.summary = f"loss {values['loss']:.4f}"
        if run.phase == "search":
            values |= self._gates()
            self.summary += f"  gates open {values['open_share']:.1%}"
        run.log.record("train", phase=run.phase, step=run.step, phase_steps=total, epoch=round(epoch, 4), **values)
        self._start_over()
        return f"{self.summary}  {values['images_per_second']:.0f} images/s"

    @torch.no_grad()
    def _gates(self) -> dict[str, float | None]:
        run, settings = self.run, self.run.recipe.architecture
        delta = schedule.delta_at(run.recipe.phases.search, settings, run.step - 1, run.train.steps_per_epoch)
        gates = run.architecture.gates(delta)
        macs, params = cost.expected(run.supernet, run.recipe.data.image_size, gates)
        open_share = run.architecture.keep(delta, settings.threshold).float().mean()
        values = {"delta": delta, "open_share": round(float(open_share), 6)}
        values |= {"expected_macs": round(float(macs)), "expected_params": round(float(params))}
        return values if settings.target is None else values | {"penalty_weight": run.penalty_weight}
