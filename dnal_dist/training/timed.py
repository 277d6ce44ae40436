"""A latency budget kept by measurement: the table chooses the channels, and the time of the compact network corrects the table."""

import math
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist.common.errors import reason
from dnal_dist.nets import compact
from dnal_dist.nets.whole import deployed
from dnal_dist.search import selection
from dnal_dist.search.budgets import MEASURED, Budget
from dnal_dist.training.run import Run

# Networks that are measured, at most: those that the table chooses, and all; and seconds for each.
PREDICTED, MOST, SECONDS = 5, 24, 3.0
# In the environment, since whoever starts a run chooses what is executed, and not its recipe.
COMMAND = "DNAL_LATENCY_COMMAND"
# What may be used of the target, since two measurements of one network differ, and what the table is asked for.
LIMIT, AIM = 0.99, 1 - MEASURED / 2


class NotMeasured(Exception):
    """The latency cannot be measured; the message says why."""


class Enough(Exception):
    """As many networks were measured as may be, or one is what is asked for."""


def select(run: Run, choose: Callable[[Budget], Tensor], target: Budget, strength: Tensor) -> tuple[Tensor, float | None]:
    """The keep mask, bool (N,), of a network within `target` as measured, and its measured latency over the predicted one; or of
    what choose(target) finds as predicted, and None, where the table's device or runtime is not here.

    First choose(budget) finds masks by what the table predicts, corrected by the last measurement. If none is near enough below the
    target, those channels of the nearest that are strongest by `strength`, (N,), are added by measurement. All processes must call
    this. The main one measures.
    """
    timer = Timer(run, target.latency)
    if run.context.from_main(timer.device is None):
        run.log.print(f"latency is not measured here, since the table is of {target.latency.table.device}")
        return choose(target), None
    trials = Trials(run, timer, target)
    try:
        _by_prediction(trials, choose)
        best = max(trials.found, key=lambda trial: trial.rank)
        if best.over <= 1:
            choice = _ByMeasurement(trials, best.keep, strength)
            choice.fill(tuple(int(part.sum()) for part in run.supernet.by_site(best.keep).values()))
    except NotMeasured as error:
        if not trials.found:
            run.log.warn(f"latency was not measured ({error}); the network keeps to the table's prediction")
            return choose(target), None
        run.log.warn(f"latency was not measured again ({error}); of {len(trials.found)} networks that were, the best counts")
    except Enough:
        pass
    best = max(trials.found, key=lambda trial: (trial.met, *trial.rank))
    return best.keep, best.factor


class Trial(NamedTuple):
    """A network that was measured."""

    over: float
    """How much of what may be used of the target it uses, of the budget that it uses most of."""
    met: bool
    """Whether every budget is met."""
    predicted: float
    factor: float
    """Of the measured latency to the predicted one."""
    keep: Tensor

    @property
    def rank(self) -> tuple[bool, float]:
        """The best is the largest within what may be used, or else the smallest."""
        return self.over <= 1, self.over if self.over <= 1 else -self.over


class Trials:
    """The networks that were measured."""

    def __init__(self, run: Run, timer: "Timer", target: Budget):
        self.run, self.timer, self.target, self.found = run, timer, target, list[Trial]()

    def measure(self, keep: Tensor) -> Trial:
        """Raises NotMeasured, and Enough once a network is what is asked for, or no more may be measured."""
        if known := next((trial for trial in self.found if torch.equal(trial.keep, keep)), None):
            return known
        if len(self.found) == MOST:
            raise Enough
        run, budget = self.run, self.target.latency
        run.stops.poll(at_once=True)
        run.log.doing("networks measured", len(self.found), MOST)
        measured, why = run.context.from_main(_tried(self.timer, keep) if run.context.main else None)
        if measured is None:
            raise NotMeasured(why)
        run.log.print(f"latency measured: {measured / 1e6:.4g} ms of {budget.most / 1e6:.4g} ms")
        predicted = float(budget.used(run.supernet, run.recipe.data.image_size, keep.double()))
        rows = self.target.corrected(measured / predicted, MEASURED).records(run.supernet, run.recipe.data.image_size, keep)
        over = max(row["used"] / row["most"] / (LIMIT if row["unit"] == "latency" else 1) for row in rows)
        met = all(row["used"] <= row["most"] for row in rows) and any(row["used"] >= row["least"] for row in rows)
        self.found.append(Trial(over, met, predicted, measured / predicted, keep))
        if met and over <= 1:
            raise Enough
        return self.found[-1]


def _by_prediction(trials: Trials, choose: Callable[[Budget], Tensor]) -> None:
    """Measure networks of which the table, as the last measurement corrects it, predicts the target."""
    budget = trials.target.latency
    # Predicted latencies: what is asked for, and between which the answer lies. Few channels make large steps.
    limit, low, high = AIM * budget.most, 0.0, math.inf
    for _ in range(PREDICTED):
        measured = len(trials.found)
        trial = trials.measure(choose(trials.target.corrected(budget.most / limit)))
        if len(trials.found) == measured:
            break
        low, high = (max(low, trial.predicted), high) if trial.over <= 1 else (low, min(high, trial.predicted))
        limit = AIM * budget.most / trial.factor
        if not low < limit < high and high < math.inf:
            limit = (low + high) / 2


class _ByMeasurement(selection.Choice):
    """Channels to be added to those of `keep`, bool (N,), each network measured. A branch that is closed there stays so."""

    def __init__(self, trials: Trials, keep: Tensor, strength: Tensor):
        run, budget = trials.run, trials.target.latency
        self.trials = trials
        still = torch.cat([part.any().expand_as(part) for part in run.supernet.by_site(keep).values()]).to(strength.device)
        # A measurement ends it once the budgets are met.
        full, strength = budget._replace(least=budget.most), strength.detach().masked_fill(~still, -math.inf)
        super().__init__(run.supernet, run.recipe.data.image_size, strength, full, run.recipe.architecture.round_to)

    def cost(self, counts: tuple[int, ...]) -> int:
        return math.ceil(self.trials.measure(self.mask(counts)).over * self.target.most)


def _tried(timer: "Timer", keep: Tensor) -> tuple[float | None, str]:
    try:
        return timer.latency(keep), ""
    except Exception as error:  # of many kinds: each runtime has its own
        return None, reason(error)


class Timer:
    """Times compact networks as the layers of a table were timed, beside the full one."""

    def __init__(self, run: Run, budget: Budget):
        self.budget, self.supernet, self.size = budget, run.supernet, run.recipe.data.image_size
        self.command, self.device, self.full = None, None, None
        table, command = budget.table, os.environ.get(COMMAND)
        if table.runtime == "command":
            if command == table.device:
                self.command, self.device = command, torch.device("cpu")
        else:
            # As late as this, since it brings what most runs have no use for.
            from dnal_dist.export.latency import device_name

            here = (run.context.device, torch.device("cpu"))
            self.device = next((device for device in here if device_name(device) == table.device), None)
        if command is not None and self.command is None:
            run.log.warn(f"${COMMAND} is not used, since the table is of {table.device}, not of {command}")

    def latency(self, keep: Tensor) -> float:
        """Nanoseconds; for a budget that is a share of the full network's latency, as if that one took `budget.full`."""
        times = (self._asked if self.command else self._taken)(keep)
        if not self.budget.relative:
            return 1e9 * statistics.median(times["compact"])
        return self.budget.full * statistics.median(own / full for own, full in zip(times["compact"], times["full"], strict=True))

    def _module(self, keep: Tensor) -> nn.Module:
        return deployed(compact.compact(self.supernet, keep)).eval().to(self.device)

    def _asked(self, keep: Tensor) -> dict[str, list[float]]:
        from dnal_dist.export.bench import CommandBench

        table = self.budget.table
        bench = CommandBench(self.command, table.batch, table.threads)
        if self.budget.relative:
            self.full = self.full or [bench.network(self._module(torch.ones_like(keep)), self.size)]
        return {"full": self.full, "compact": [bench.network(self._module(keep), self.size)]}

    @torch.no_grad()
    def _taken(self, keep: Tensor) -> dict[str, list[float]]:
        from dnal_dist.export import latency

        usual = torch.get_num_threads()
        torch.set_num_threads(self.budget.table.threads)
        try:
            if self.budget.relative:
                self.full = self.full or self._runner(torch.ones_like(keep))
            runs = {"full": self.full, "compact": self._runner(keep)}
            return latency.rounds({name: run for name, run in runs.items() if run}, SECONDS, self.device)
        finally:
            torch.set_num_threads(usual)

    def _runner(self, keep: Tensor) -> Callable[[], Tensor]:
        from dnal_dist.export import latency

        table = self.budget.table
        images = torch.randn(table.batch, 3, self.size, self.size, device=self.device)
        with tempfile.TemporaryDirectory() as folder:
            return latency.runner(self._module(keep), images, table.runtime, table.threads, Path(folder))
