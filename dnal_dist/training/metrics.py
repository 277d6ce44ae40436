"""Training metrics since the last record: means over all processes, speed, traffic, and skipped images."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from dnal_dist.checkpoint.format import PendingMetrics
from dnal_dist.common.errors import InputError
from dnal_dist.common.span import spanned
from dnal_dist.data.device import Fed
from dnal_dist.data.pipeline import Stream
from dnal_dist.distributed.traffic import Traffic
from dnal_dist.distributed.wrapper import Trained
from dnal_dist.nets import cost
from dnal_dist.search import schedule
from dnal_dist.tracking.progress import Pace, brief
from dnal_dist.training import divergence
from dnal_dist.training.run import Run
from dnal_dist.training.steps import Outcome

# Numbers of each process that a record sums up.
SUMS = 7
SOFT = (
    "while the gates are soft few of them are above the threshold, and accuracy may fall: the next BatchNorm takes a common factor "
    "out. Both settle as the gates harden, by the end of the search"
)


def check_skipped(run: Run, skipped: list[str], stream: Stream, key: str) -> None:
    """Name skipped samples of `stream` when first met; raise InputError if they are more than the recipe's fraction."""
    if not skipped:
        return
    known = run.state.skipped
    new = [image for image in skipped if image not in known] or skipped
    named = "; ".join(new[:3]) + (f"; and {len(new) - 3} more" if len(new) > 3 else "")
    limit = run.recipe.data.max_bad_fraction
    if len(skipped) > limit * stream.samples:
        raise InputError(
            f"{named}: {len(skipped)} of {stream.samples} samples of {key} cannot be used, more than "
            f"data.max_bad_fraction={limit:g} allows; mend the shards or raise it"
        )
    if not known.issuperset(skipped):
        run.log.warn(f"skipped {len(skipped)} of {stream.samples} samples of {key}: {named}")
    known.update(skipped)


def total_bytes(sent: int | None, steps: dict[str, int], measured: dict[str, int]) -> int | None:
    """Bytes of all steps: `sent` by earlier ones, then `steps` of each kind at `measured` bytes each; None if unknown."""
    if sent is None or not steps.keys() <= measured.keys():
        return None
    return sent + sum(number * measured[kind] for kind, number in steps.items())


def _peak_memory(device: torch.device) -> int | None:
    """Peak bytes of tensors on a GPU since the last call."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def epochs(done: float, total: float) -> str:
    """Epochs of a phase for its progress line, 3.25/10."""
    digits = 2 if total < 100 else 1
    return f"{done:.{digits}f}/{round(total, digits):g}"


class Metrics:
    """Sums over the iterations since the last record; recording them takes one collective."""

    def __init__(self, run: Run):
        self.run, self.summary, self.warned = run, "", False
        self.skipped: set[str] = set()
        """Images of this phase that did not decode; each counts once, in however many epochs."""
        self.bytes: dict[str, int] = {}
        """Fewest bytes that a measured step of each kind sent."""
        cycle = run.recipe.phases.search.cycle if run.state.phase == "search" else 1
        # The very first steps send more than all that follow. A compiled step would not compile while it is measured.
        silent = run.recipe.training.compile or run.context.backend == "single"
        self.listening, self.traffic = 0 if silent else 3 * cycle, None
        self.steps: dict[str, int] = {}
        """Steps of each kind that these processes took."""
        self.sent: int | None = 0
        """Bytes of earlier steps, on other processes."""
        self._reset()
        if run.pending is not None:
            self._resume(*run.pending)
            run.pending = None

    def _resume(self, pending: PendingMetrics, sums: Tensor, same_topology: bool) -> None:
        """Traffic is measured again where it may differ."""
        self.sums += sums.to(self.sums.device)
        self.skipped.update(pending.skipped)
        self.summary, self.since = pending.summary, self.since - pending.seconds
        if same_topology:
            # The first steps after a start send more than others: a measurement that was under way starts again.
            self.bytes, self.listening = dict(pending.bytes), self.listening if pending.listening else 0
            self.steps, self.sent = dict(pending.steps), pending.sent
        else:
            self.sent = total_bytes(pending.sent, pending.steps, pending.bytes)

    def pending(self) -> PendingMetrics:
        """Everything since the last record except `sums`, of which each process has its own. All processes must call this."""
        return PendingMetrics(
            summary=self.summary,
            bytes=self.bytes,
            listening=self.listening,
            seconds=time.monotonic() - self.since - self.paused,
            skipped=self._all_skipped(),
            steps=dict(self.steps),
            sent=self.sent,
        )

    def bytes_sent(self) -> int | None:
        """Bytes that each process sent in all steps of the phase so far; None where nothing was sent or measured."""
        return total_bytes(self.sent, self.steps, self.bytes) or None

    def _all_skipped(self) -> list[str]:
        return sorted(set(self.run.context.gather(sorted(self.skipped))))

    def _reset(self) -> None:
        # cross-entropy, correct, images, penalty, architecture steps, images skipped, loss without the penalty
        self.sums = torch.zeros(SUMS, dtype=torch.float64, device=self.run.context.device)
        self.since, self.waited, self.paused = time.monotonic(), 0.0, 0.0

    def add_batch(self, fed: Fed) -> None:
        self.waited += fed.waited
        self.skipped.update(map(str, fed.batch.bad))
        self.sums[5] += len(fed.batch.bad)
        self.sums[2] += len(fed.batch.labels)

    @contextlib.contextmanager
    def measured_traffic(self) -> Iterator[None]:
        """Measure the bytes that the step in here sends, during the first steps of a phase."""
        if not self.listening:
            yield
            return
        self.listening -= 1
        with Traffic() as self.traffic:
            yield

    def add_outcome(self, outcome: Outcome) -> None:
        self.sums[0] += outcome.cross_entropy
        self.sums[6] += outcome.loss
        self.sums[1] += outcome.correct
        kind = f"comm/bytes_{'weight' if outcome.penalty is None else 'architecture'}_step"
        if self.run.context.world_size > 1:
            self.steps[kind] = self.steps.get(kind, 0) + 1
        if self.traffic is not None:
            # The least, not the last: the second step after a start sends more under DDP, and a run resumes anywhere.
            self.bytes[kind], self.traffic = min(self.traffic.bytes, self.bytes.get(kind, self.traffic.bytes)), None
        if outcome.penalty is not None:
            self.sums[3] += outcome.penalty
            self.sums[4] += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here does not count as training."""
        begun = time.monotonic()
        yield
        self.paused += time.monotonic() - begun

    @spanned("logging")
    def record(self, trained: Trained, rate: float, total: int, epoch: float, pace: Pace) -> str:
        """Record the means since the last record and return them as text of 71 characters or fewer, which leaves room for the
        phase in 80 columns. Raises InputError if training diverged or too many images were skipped."""
        run, position = self.run, self.run.state
        found = run.context.sum_(torch.cat([self.sums, divergence.flags(run, trained)])).tolist()
        (cross_entropy, correct, images, penalty, penalties, skipped, loss), diverged = found[:SUMS], found[SUMS:]
        if skipped:
            check_skipped(run, self._all_skipped(), run.train, "data.train")
        images = max(images, 1)
        cross_entropy, loss = cross_entropy / images, loss / images
        divergence.check(run, diverged, cross_entropy, divergence.HIGHEST_LOSS)
        if not self.warned and (strange := divergence.warning(run, cross_entropy)):
            self.warned = True
            run.log.warn(strange)
        # Each process added the same penalty once a step.
        penalty = penalty / penalties if penalties else None
        # A weight in closed loop changes with every step, its sign too, so the loss is without it.
        driven = run.budget is not None
        values = {
            "loss": round(loss + (0.0 if driven else penalty or 0.0), 6),
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
        accuracy, speed = values["accuracy"], values["images_per_second"]
        self.summary = f"lr {rate:.2g}  ce {cross_entropy:.3f}  train {accuracy:.1%}"
        open_share = ""
        if position.phase == "search":
            values |= self._gates()
            open_share = f"  open {values['open_share']:.0%}"
            if values["open_share"] < 0.1 and position.step < total and not run.architecture.hard:
                run.log.explain(SOFT)
        left = pace.left(position.step)
        if left is not None:
            values |= {"eta_seconds": round(left[0], 1), "run_eta_seconds": round(left[1], 1)}
        run.log.record("train", phase=position.phase, step=position.step, phase_steps=total, epoch=round(epoch, 4), **values)
        self._reset()
        eta = "" if left is None else f"  eta {brief(left[0])}/{brief(left[1])}"
        return f"{epochs(epoch, total / run.train.steps_per_epoch)}{eta}  {self.summary}  {speed:.0f} im/s{open_share}"

    @torch.no_grad()
    def _gates(self) -> dict[str, float | None]:
        run, settings = self.run, self.run.recipe.architecture
        delta = schedule.delta_at(run.recipe.phases.search, settings, run.state.step - 1, run.train.steps_per_epoch)
        macs, params = cost.expected(run.supernet, run.recipe.data.image_size, run.architecture.gates(delta))
        open_share = run.architecture.keep(delta, settings.threshold).float().mean()
        values = {"delta": None if run.architecture.hard else delta, "open_share": round(float(open_share), 6)}
        values |= {"expected_macs": round(float(macs)), "expected_params": round(float(params))}
        driven = run.budget is not None and not run.architecture.hard
        return values | {"penalty_weight": run.state.penalty_weight} if driven else values
