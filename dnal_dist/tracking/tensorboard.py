"""Metrics to TensorBoard."""

from pathlib import Path

import numpy as np

from dnal_dist.distributed.context import Context
from dnal_dist.tracking.values import Sent, Tracker


class TensorBoard(Tracker):
    """Event files in the run folder, through Accelerate."""

    def __init__(self, folder: Path, recipe, context: Context):
        import torch.utils.tensorboard  # noqa: F401  before loaders are forked, which may wait for a module that is half there

        super().__init__(folder, recipe, context)

    def start(self, behind: int) -> None:
        # Records of later steps, from before a resume, are hidden; they come again.
        purge = {"purge_step": behind + 1}
        self.writer = self.context.start_tracker("tensorboard", None, {"tensorboard": purge})
        settings = self.recipe.model_dump_json(indent=2)
        self.writer.add_text("recipe", "\n".join(f"    {line}" for line in settings.splitlines()), behind)

    def show(self, found: Sent, global_step: int, _: int) -> None:
        self.context.log(found.scalars, global_step)
        for name, counts in found.histograms.items():
            self._histogram(name, counts, global_step)
        for name, (columns, rows) in found.tables.items():
            lines = [columns, ["---"] * len(columns), *rows]
            self.writer.add_text(name, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), global_step)

    def _histogram(self, name: str, counts: list[int], global_step: int) -> None:
        limits = np.linspace(0, 1, len(counts) + 1)
        middles = (limits[1:] + limits[:-1]) / 2
        self.writer.add_histogram_raw(
            name,
            min=0.0,
            max=1.0,
            num=sum(counts),
            sum=float(middles @ counts),
            sum_squares=float(middles**2 @ counts),
            bucket_limits=limits[1:].tolist(),
            bucket_counts=counts,
            global_step=global_step,
        )
