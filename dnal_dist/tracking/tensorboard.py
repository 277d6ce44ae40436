"""Metrics to TensorBoard."""

from pathlib import Path

import numpy as np

from dnal_dist.distributed.context import Context
from dnal_dist.tracking.values import figures, outcome, sites_table


class TensorBoard:
    """Event files in the run folder, through Accelerate."""

    def __init__(self, folder: Path, recipe, context: Context):
        import torch.utils.tensorboard  # noqa: F401  before loaders are forked, which may wait for a module that is half there

        self.folder, self.recipe, self.context, self.sites = folder, recipe, context, {}

    def start(self, behind: int) -> None:
        # What was told of later steps is told again, and hidden until then.
        purge = {"purge_step": behind + 1}
        self.writer = self.context.start_tracker("tensorboard", None, {"tensorboard": purge})
        settings = self.recipe.model_dump_json(indent=2)
        self.writer.add_text("recipe", "\n".join(f"    {line}" for line in settings.splitlines()), behind)

    def take(self, kind: str, values: dict, global_step: int, _: int) -> None:
        if kind == "start":
            self.sites = values["sites"]
            return
        self.context.log(figures(kind, values), global_step)
        if kind == "gates":
            self._histogram(values["histogram"], global_step)
            for site, number in values["open"].items():
                self.writer.add_scalar(f"gates/open_share/{site}", number / self.sites[site], global_step)
        if kind == "prune":
            columns, rows = sites_table(self.sites, values["kept"])
            lines = [columns, ["---"] * len(columns), *rows]
            self.writer.add_text("prune/sites", "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), global_step)

    def _histogram(self, counts: list[int], global_step: int) -> None:
        limits = np.linspace(0, 1, len(counts) + 1)
        middles = (limits[1:] + limits[:-1]) / 2
        self.writer.add_histogram_raw(
            "gates/histogram",
            min=0.0,
            max=1.0,
            num=sum(counts),
            sum=float(middles @ counts),
            sum_squares=float(middles**2 @ counts),
            bucket_limits=limits[1:].tolist(),
            bucket_counts=counts,
            global_step=global_step,
        )

    def deliver(self, global_step: int) -> None:
        """The figures of the final table."""
        self.context.log(outcome(self.folder), global_step)

    def stop(self) -> None:
        self.context.stop_tracker()

    def give_up(self) -> None:
        """Nothing: whatever it waits for is a disk."""
