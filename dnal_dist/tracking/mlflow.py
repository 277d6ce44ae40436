"""Metrics to MLflow."""

import os
from pathlib import Path

from dnal_dist.distributed.context import Context
from dnal_dist.tracking.values import outcome, sent


class MLflow:
    """A run of an MLflow experiment, through Accelerate: on the server that MLFLOW_TRACKING_URI names, else in the run folder."""

    def __init__(self, folder: Path, recipe, context: Context, run: str):
        """run: a name of the run that resumes share, by which it is found again."""
        import mlflow  # before loaders are forked, which may wait for a module that is half there

        self.mlflow, self.folder, self.recipe, self.context, self.run, self.sites = mlflow, folder, recipe, context, run, {}
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

    def send(self, kind: str, values: dict, global_step: int, _: int) -> None:
        if kind == "start":
            self.sites = values["sites"]
            return
        found = sent(kind, values, self.sites)
        if found.scalars:
            self.context.log(found.scalars, global_step)
        for name, (columns, rows) in found.tables.items():
            table = {column: [row[number] for row in rows] for number, column in enumerate(columns)}
            self.mlflow.log_dict(table, f"{name}.json")

    def finish(self, global_step: int) -> None:
        """Send the numbers of the final table."""
        self.context.log(outcome(self.folder), global_step)

    def stop(self) -> None:
        self.context.stop_tracker()

    def give_up(self) -> None:
        """Nothing to do: its requests have time limits of their own."""
