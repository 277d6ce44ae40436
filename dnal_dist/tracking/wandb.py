"""Metrics to Weights & Biases."""

import contextlib
import os
import re
import threading
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dnal_dist.common.errors import reason
from dnal_dist.distributed.context import Context
from dnal_dist.tracking.values import Sent, Tracker, outcome, shown_name

# Seconds that W&B tries to start; fewer than a run waits for it (background.START_SECONDS).
INIT_SECONDS = 15.0
# Seconds that W&B keeps values in memory: a killed service loses no more.
FLUSH_SECONDS = 1.0
# Seconds that W&B's service has to end after the last value.
LEAVE_SECONDS = 2.0

# Statistics of a series that W&B shows beside its last value.
SUMMARIES = {
    "eval/accuracy": "max,last",
    "eval/top5": "max,last",
    "eval/cross_entropy": "min,last",
    "train/loss": "min,last",
    "train/images_per_second": "mean,last",
    "train/data_wait_seconds": "mean,max",
    "train/device_memory_bytes": "max",
}


def library():
    """The wandb module, which takes a second to import."""
    # It would report its own errors to its maker, and without a network wait half a minute for that at the end.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def logged_in() -> bool:
    """Whether W&B finds an API key, in its environment variables or the netrc file. Nothing is sent."""
    wandb = library()
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    try:
        # Not wandb.setup(), which starts a process.
        host = wandb_setup.singleton().settings.base_url
        return wbauth.authenticate_session(host=host, source="dnal_dist", prompt=False, update_session=False) is not None
    except wandb.errors.Error:
        return False  # a malformed key


def wandb_mode(given: str | None) -> tuple[str, str | None]:
    """W&B's mode and a warning about it: that of the recipe (`given`), else of WANDB_MODE, else online if logged in. "disabled" by
    WANDB_DISABLED, which other libraries heed, or by WANDB_MODE."""
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "on"):
        return "disabled", "W&B is off, by the environment variable WANDB_DISABLED; metrics.jsonl has all"
    mode = given or os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    if mode == "disabled":
        return mode, None
    if mode == "online" and not logged_in():
        why = "W&B runs offline: it finds no API key; use `wandb login`, or set WANDB_API_KEY"
        return "offline", f"{why}, and send the run later by `wandb sync`"
    return mode, None


def safe(name: str, most: int = 100) -> str:
    """A name of ASCII letters, digits and dashes, which every part of W&B takes."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^\w.-]+", "-", letters).strip("-.")[:most] or "run"


class Wandb(Tracker):
    """A W&B run, through Accelerate."""

    def __init__(self, folder: Path, recipe, context: Context, run_id: str, mode: str):
        super().__init__(folder.resolve(), recipe, context)
        self.wandb, self.id, self.mode = library(), run_id, mode
        self.age, self.data, self.name = -1, None, shown_name(folder, recipe.name)

    def start(self, _: int) -> str:
        """Returns what is to be said about it; "" if nothing is."""
        given = self.recipe.tracking.project
        remarks = [f"calls the project {given!r} {safe(given)!r}, of the letters that it takes"] if safe(given) != given else []
        if "WANDB_DATA_DIR" not in os.environ:
            # Copies of artifacts belong to the run; a home may be full, or missing on another machine.
            self.data = os.environ["WANDB_DATA_DIR"] = str(self.folder / "wandb" / "data")
        try:
            self._begin(self.mode)
        except Exception as error:
            if self.mode != "online":
                raise
            # A key, but no network. The service still tries.
            self.give_up()
            self._teardown()
            self._begin("offline")
            remarks.append(f"cannot be reached and runs offline, send the run later by `wandb sync` ({reason(error)})")
        # W&B's own step only grows, but a resumed run takes some steps again.
        self.run.define_metric("global_step", hidden=True)
        self.run.define_metric("*", step_metric="global_step")
        for name, kinds in SUMMARIES.items():
            self.run.define_metric(name, step_metric="global_step", summary=kinds)
        return "; ".join(remarks)

    def _begin(self, mode: str) -> None:
        quiet = {"silent": True, "console": "off", "x_disable_stats": True}
        settings = self.wandb.Settings(**quiet, init_timeout=INIT_SECONDS, x_transaction_log_flush_interval=FLUSH_SECONDS)
        begin = {"name": self.name, "dir": str(self.folder), "mode": mode, "settings": settings}
        begin |= {"id": self.id, "resume": "allow"}
        self.run = self.context.start_tracker(
            safe(self.recipe.tracking.project), self.recipe.model_dump(mode="json"), {"wandb": begin}
        )

    def send(self, kind: str, values: dict, global_step: int, age: int) -> None:
        if kind == "start":
            self.run.config.update({"start": values}, allow_val_change=True)
        super().send(kind, values, global_step, age)

    def show(self, found: Sent, global_step: int, age: int) -> None:
        row = dict(found.scalars)
        for name, counts in found.histograms.items():
            row[name] = self.wandb.Histogram(np_histogram=(np.array(counts), np.linspace(0, 1, len(counts) + 1)))
        for name, (columns, rows) in found.tables.items():
            row[name] = self.wandb.Table(columns=columns, data=rows)
        if row:
            # W&B keeps only the last values at one of its steps.
            self.age = max(self.age + 1, age)
            self.run.log(row | {"global_step": global_step}, step=self.age, commit=True)

    def finish(self, _: int) -> list[Callable]:
        """What sends the numbers of the final table, the compact network, and the report."""
        folder, compact = self.folder, self.folder / "compact"
        report = [folder / file for file in ("report.html", "report.md", "metrics.jsonl", "recipe.yaml")]
        report += sorted((folder / "plots").glob("*"))
        return [
            lambda: self.run.summary.update(outcome(folder)),
            partial(self._keep, "model", "compact", compact, sorted(compact.glob("*"))),
            partial(self._keep, "report", "report", folder, [path for path in report if path.exists()]),
        ]

    def _keep(self, kind: str, what: str, within: Path, files: list[Path]) -> None:
        """Send files as an artifact."""
        artifact = self.wandb.Artifact(f"{safe(self.name)}-{what}", kind, metadata={"run": self.id})
        for path in files:
            # These files no longer change, so they need not be copied first.
            artifact.add_file(str(path), str(path.relative_to(within)), policy="immutable", skip_cache=True)
        self.run.log_artifact(artifact, aliases=[self.id])

    def stop(self) -> None:
        if self.data is not None and os.environ.get("WANDB_DATA_DIR") == self.data:
            del os.environ["WANDB_DATA_DIR"]
        try:
            super().stop()
        finally:
            # Else Python would wait at its end, without a limit, for W&B's service.
            leaving = threading.Thread(target=self._teardown, daemon=True)
            leaving.start()
            leaving.join(LEAVE_SECONDS)
            if leaving.is_alive():
                self.give_up()
                leaving.join(LEAVE_SECONDS)

    def _teardown(self) -> None:
        with contextlib.suppress(Exception, SystemExit):
            self.wandb.teardown()

    def give_up(self) -> None:
        """End W&B's service, so that calls that wait for it fail. Their values are in the run folder."""
        import psutil

        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name() == "wandb-core":
                    # Either way it loses up to FLUSH_SECONDS of values.
                    child.terminate()
                    for alive in psutil.wait_procs([child], LEAVE_SECONDS)[1]:
                        alive.kill()
                        alive.wait(1)
