"""A latency budget kept by measurement: the table chooses the channels, and the time of the compact network corrects the table."""

import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dnal_dist.common.errors import reason
from dnal_dist.nets import compact
from dnal_dist.nets.whole import whole
from dnal_dist.search.selection import MEASURED, Budget
from dnal_dist.training.run import Run

# Networks that are measured, and seconds for each.
MOST, SECONDS = 6, 3.0
# What is aimed at, as a share of the target: the middle of what may be left unused.
AIM = 1 - MEASURED / 2


def select(run: Run, choose: Callable[[Budget], Tensor], target: Budget) -> tuple[Tensor, float | None]:
    """The keep mask, bool (N,), that choose(budget) finds within `target` as measured, and its measured latency over the predicted
    one; or within `target` as predicted, and None, where the table's device or runtime is not here.

    All processes must call this. The main one measures.
    """
    budget, size, found = target.latency, run.recipe.data.image_size, []
    bench = Bench(run, budget)
    if run.context.from_main(bench.device is None):
        run.log.print(f"latency is not measured here, since the table is of {budget.table.device}")
        return choose(target), None
    # Predicted latencies: what may be asked for next, and between which the answer lies. Few channels make large steps.
    limit, low, high = AIM * budget.most, 0.0, math.inf
    for number in range(MOST):
        run.log.doing("networks measured", number, MOST)
        keep = choose(target.corrected(budget.most / limit))
        measured, why = run.context.from_main(_tried(bench, keep) if run.context.main else None)
        if measured is None:
            run.log.warn(f"latency was not measured ({why}); the network keeps to the table's prediction")
            return choose(target), None
        run.log.print(f"latency measured: {measured / 1e6:.4g} ms of {budget.most / 1e6:.4g} ms")
        predicted = float(budget.used(run.supernet, size, keep.double()))
        factor = measured / predicted
        rows = target.corrected(factor).records(run.supernet, size, keep)
        over = max(row["used"] / row["most"] for row in rows)
        found.append((over <= 1, over if over <= 1 else -over, number, keep, factor))
        if over <= 1 and any(row["used"] >= row["least"] for row in rows):
            break
        low, high = (max(low, predicted), high) if measured <= budget.most else (low, min(high, predicted))
        limit = AIM * budget.most / factor
        if not low < limit < high and high < math.inf:
            limit = (low + high) / 2
    # The largest within the target, or else the smallest.
    return max(found)[3:]


def _tried(bench: "Bench", keep: Tensor) -> tuple[float | None, str]:
    try:
        return bench.latency(keep), ""
    except Exception as error:  # of many kinds: each runtime has its own
        return None, reason(error)


class Bench:
    """Times compact networks as the layers of a table were timed, beside the full one."""

    def __init__(self, run: Run, budget: Budget):
        self.budget, self.supernet, self.size = budget, run.supernet, run.recipe.data.image_size
        self.command, self.device = None, None
        table = budget.table
        if table.runtime == "command":
            if run.recipe.architecture.target.command == table.device:
                self.command, self.device = table.device, torch.device("cpu")
            return
        # As late as this, since it brings what most runs have no use for.
        from dnal_dist.export.latency import device_name

        here = (run.context.device, torch.device("cpu"))
        self.device = next((device for device in here if device_name(device) == table.device), None)

    def latency(self, keep: Tensor) -> float:
        """Nanoseconds; for a budget that is a share of the full network's latency, as if that one took `budget.full`."""
        everything = torch.ones_like(keep)
        times = (self._asked if self.command else self._taken)({"full": self._module(everything), "compact": self._module(keep)})
        if not self.budget.relative:
            return 1e9 * statistics.median(times["compact"])
        return self.budget.full * statistics.median(own / full for own, full in zip(times["compact"], times["full"], strict=True))

    def _module(self, keep: Tensor) -> nn.Module:
        return whole(compact.compact(self.supernet, keep)).eval()

    def _asked(self, modules: dict[str, nn.Module]) -> dict[str, list[float]]:
        from dnal_dist.export.bench import CommandBench

        table = self.budget.table
        bench = CommandBench(self.command, table.batch, table.threads)
        return {name: [bench.network(module.cpu(), self.size)] for name, module in modules.items()}

    @torch.no_grad()
    def _taken(self, modules: dict[str, nn.Module]) -> dict[str, list[float]]:
        from dnal_dist.export import latency

        table, usual = self.budget.table, torch.get_num_threads()
        images = torch.randn(table.batch, 3, self.size, self.size, device=self.device)
        torch.set_num_threads(table.threads)
        try:
            with tempfile.TemporaryDirectory() as folder:
                runs = {}
                for name, module in modules.items():
                    (own := Path(folder) / name).mkdir()
                    runs[name] = latency.runner(module.to(self.device), images, table.runtime, table.threads, own)
                return latency.rounds(runs, SECONDS, self.device)
        finally:
            torch.set_num_threads(usual)
