"""Metrics to Weights & Biases."""

import contextlib
import os
import re
import threading
from pathlib import Path

import numpy as np

from dnal_dist.distributed.context import Context
from dnal_dist.tracking.background import said
from dnal_dist.tracking.values import figures, outcome, shown_name, sites_table

# How long W&B tries to start; less than a run waits for that (sender.START_SECONDS).
INIT_SECONDS = 15.0
# W&B keeps what it is told in memory for so long; of its service, when it is killed, no more than that is lost.
FLUSH_SECONDS = 1.0
# How long W&B's service has to end when all is said.
LEAVE_SECONDS = 2.0

# What W&B shows of a series beside its last value.
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
    """The wandb module, which takes a second to import: only where it is wanted."""
    # It would report its own errors to its maker, and wait half a minute at the end where there is no way to them.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def logged_in() -> bool:
    """Whether W&B would find an API key, in its environment variables or the netrc file. Nothing is sent."""
    wandb = library()
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    try:
        # Not wandb.setup(), which starts a process.
        host = wandb_setup.singleton().settings.base_url
        return wbauth.authenticate_session(host=host, source="dnal_dist", prompt=False, update_session=False) is not None
    except wandb.errors.Error:
        return False  # a key of no valid form


def wandb_mode(asked: str | None) -> tuple[str, str | None]:
    """What W&B does, and what is to be said about that: as the recipe asks, else as WANDB_MODE does, else online if logged in."""
    mode = asked or os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    if mode == "online" and not logged_in():
        why = "W&B runs offline: it finds no API key; use `wandb login`, or set WANDB_API_KEY"
        return "offline", f"{why}, and send the run later by `wandb sync`"
    return mode, None


class Wandb:
    """A W&B run, through Accelerate."""

    def __init__(self, folder: Path, recipe, context: Context, run_id: str, mode: str):
        self.wandb, self.context, self.folder = library(), context, folder.resolve()
        self.recipe, self.id, self.mode, self.sites = recipe, run_id, mode, {}
        self.age, self.data, self.name = -1, None, shown_name(folder, recipe.name)

    def start(self, _: int) -> str | None:
        remark = None
        if "WANDB_DATA_DIR" not in os.environ:
            # Copies of what is to be uploaded belong to the run; a home may be full, or not there on another machine.
            self.data = os.environ["WANDB_DATA_DIR"] = str(self.folder / "wandb" / "data")
        try:
            self._begin(self.mode)
        except Exception as error:
            if self.mode != "online":
                raise
            # There may be a key, but no way out of this machine. The service still tries.
            self.give_up()
            self._take_leave()
            self._begin("offline")
            remark = f"cannot be reached and runs offline, send the run later by `wandb sync` ({said(error)})"
        # W&B's own step only grows, but a run that goes on from an older checkpoint takes some of its steps again.
        self.run.define_metric("global_step", hidden=True)
        self.run.define_metric("*", step_metric="global_step")
        for name, kinds in SUMMARIES.items():
            self.run.define_metric(name, step_metric="global_step", summary=kinds)

        return remark

    def _begin(self, mode: str) -> None:
        quiet = {"silent": True, "console": "off", "x_disable_stats": True}
        settings = self.wandb.Settings(**quiet, init_timeout=INIT_SECONDS, x_transaction_log_flush_interval=FLUSH_SECONDS)
        begin = {"name": self.name, "dir": str(self.folder), "mode": mode, "settings": settings}
        begin |= {"id": self.id, "resume": "allow"}
        self.run = self.context.start_tracker(self.recipe.tracking.project, self.recipe.model_dump(mode="json"), {"wandb": begin})

    def take(self, kind: str, values: dict, global_step: int, age: int) -> None:
        if kind == "start":
            self.sites = values["sites"]
            self.run.config.update({"start": values}, allow_val_change=True)
            return
        told = figures(kind, values) | self._images(kind, values)
        if told:
            # Of what comes at one step W&B keeps the last.
            self.age = max(self.age + 1, age)
            self.run.log(told | {"global_step": global_step}, step=self.age, commit=True)

    def _images(self, kind: str, values: dict) -> dict:
        if kind == "gates":
            counts = values["histogram"]
            shares = {f"gates/open_share/{site}": number / self.sites[site] for site, number in values["open"].items()}
            bins = np.array(counts), np.linspace(0, 1, len(counts) + 1)
            return {"gates/histogram": self.wandb.Histogram(np_histogram=bins), **shares}
        if kind == "prune":
            columns, rows = sites_table(self.sites, values["kept"])
            return {"prune/sites": self.wandb.Table(columns=columns, data=rows)}
        return {}

    def deliver(self, _: int) -> None:
        """The figures of the final table, the compact network, and the report."""
        self.run.summary.update(outcome(self.folder))
        name = re.sub(r"[^\w.-]+", "-", self.name)
        report = [self.folder / file for file in ("report.html", "report.md", "metrics.jsonl", "recipe.yaml")]
        report += sorted((self.folder / "plots").glob("*"))
        for kind, what, within, files in (
            ("model", "compact", self.folder / "compact", sorted((self.folder / "compact").glob("*"))),
            ("report", "report", self.folder, [path for path in report if path.exists()]),
        ):
            artifact = self.wandb.Artifact(f"{name}-{what}", kind, metadata={"run": self.id})
            for path in files:
                # Nobody changes them any more, so they need not be copied before they are sent.
                artifact.add_file(str(path), str(path.relative_to(within)), policy="immutable", skip_cache=True)
            self.run.log_artifact(artifact, aliases=[self.id])

    def stop(self) -> None:
        if self.data is not None and os.environ.get("WANDB_DATA_DIR") == self.data:
            del os.environ["WANDB_DATA_DIR"]
        try:
            self.context.stop_tracker()
        finally:
            # Else Python would wait at its end, without a limit, for W&B's service to end.
            leaving = threading.Thread(target=self._take_leave, daemon=True)
            leaving.start()
            leaving.join(LEAVE_SECONDS)
            if leaving.is_alive():
                self.give_up()
                leaving.join(LEAVE_SECONDS)

    def _take_leave(self) -> None:
        with contextlib.suppress(Exception, SystemExit):
            self.wandb.teardown()

    def give_up(self) -> None:
        """Have calls that wait for W&B's service fail. What they told lies in the run folder."""
        import psutil

        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name() != "wandb-core":
                    continue
                # Neither way does it write what it holds: see FLUSH_SECONDS.
                child.terminate()
                with contextlib.suppress(psutil.TimeoutExpired):
                    child.wait(LEAVE_SECONDS)
                    continue
                child.kill()
                child.wait(1)
