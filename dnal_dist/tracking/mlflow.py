"""Metrics to MLflow."""

import os
from pathlib import Path

from dnal_dist.distributed.context import Context
from dnal_dist.tracking.values import Sent, Tracker


class MLflow(Tracker):
    """A run of an MLflow experiment, through Accelerate: on the server that MLFLOW_TRACKING_URI names, else in the run folder."""

    def __init__(self, folder: Path, recipe, context: Context, run: str):
        """run: a name of the run that resumes share, by which it is found again."""
        import mlflow  # before loaders are forked, which may wait for a module that is half there

        super().__init__(folder, recipe, context)
        self.mlflow, self.run = mlflow, run
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            (folder / "mlflow").mkdir(exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow' / 'mlflow.db').resolve()}")

    def start(self, behind: int) -> None:
        project, tags = self.recipe.tracking.project, {"dnal_dist": self.run}
        before = None
        if experiment := self.mlflow.get_experiment_by_name(project):
            found = self.mlflow.search_runs(
                [experiment.experiment_id], f"tags.dnal_dist = '{self.run}'", max_results=1, output_format="list"
            )
            before = found[0].info.run_id if found else None
        settings = {"run_id": before, "run_name": self.recipe.name, "tags": tags}
        self.context.start_tracker(project, None, {"mlflow": settings})
        if before is None:
            self.mlflow.log_dict(self.recipe.model_dump(mode="json"), "recipe.yaml")

    def show(self, found: Sent, global_step: int, _: int) -> None:
        if found.scalars:
            self.context.log(found.scalars, global_step)
        for name, (columns, rows) in found.tables.items():
            table = {column: [row[number] for row in rows] for number, column in enumerate(columns)}
            self.mlflow.log_dict(table, f"{name}.json")
