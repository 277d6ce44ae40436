"""A latency budget kept by measurement: the table chooses the channels, and the time of the compact network corrects the table."""

import math
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dnal_dist.common.errors import reason
from dnal_dist.nets import compact
from dnal_dist.nets.whole import deployed
from dnal_dist.search.budgets import MEASURED, Budget
from dnal_dist.training.run import Run

# Networks that are measured, and seconds for each.
MOST, SECONDS = 6, 3.0
# In the environment, since whoever starts a run chooses what is executed, and not its recipe.
COMMAND = "DNAL_LATENCY_COMMAND"
# What is aimed at, as a share of the target: the middle of what may be left unused.
AIM = 1 - MEASURED / 2


def select(run: Run, choose: Callable[[Budget], Tensor], target: Budget) -> tuple[Tensor, float | None]:
    """The keep mask, bool (N,), that choose(budget) finds within `target` as measured, and its measured latency over the predicted
    one; or within `target` as predicted, and None, where the table's device or runtime is not here.

    All processes must call this. The main one measures.
    """
    budget, size, found = target.latency, run.recipe.data.image_size, []
    timer = Timer(run, budget)
    if run.context.from_main(timer.device is None):
        run.log.print(f"latency is not measured here, since the table is of {budget.table.device}")
        return choose(target), None
    # Predicted latencies: what may be asked for next, and between which the answer lies. Few channels make large steps.
    aim, limit, low, high = AIM, AIM * budget.most, 0.0, math.inf
    for number in range(MOST):
        run.stops.poll(at_once=True)
        run.log.doing("networks measured", number, MOST)
        keep = choose(target.corrected(budget.most / limit))
        measured, why = run.context.from_main(_tried(timer, keep) if run.context.main else None)
        if measured is None:
            run.log.warn(f"latency was not measured ({why}); the network keeps to the table's prediction")
            return choose(target), None
        run.log.print(f"latency measured: {measured / 1e6:.4g} ms of {budget.most / 1e6:.4g} ms")
        predicted = float(budget.used(run.supernet, size, keep.double()))
        factor = measured / predicted
        rows = target.corrected(factor, MEASURED).records(run.supernet, size, keep)
        over = max(row["used"] / row["most"] for row in rows)
        found.append((over <= 1, over if over <= 1 else -over, number, keep, factor))
        if over <= 1 and any(row["used"] >= row["least"] for row in rows):
            break
        if any(torch.equal(keep, other) for *_, other, _ in found[:-1]):
            # Steps of several channels may leave nothing nearer to the middle, but something nearer to the target.
            if aim == 1:
                break
            aim = 1.0
        low, high = (max(low, predicted), high) if measured <= budget.most else (low, min(high, predicted))
        limit = aim * budget.most / factor
        if not low < limit < high and high < math.inf:
            limit = (low + high) / 2
    # The largest within the target, or else the smallest.
    return max(found)[3:]


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
