"""What W&B and TensorBoard get of a run's records."""

import contextlib
import importlib.util
import os
import re
import threading
from pathlib import Path

import numpy as np

from dnal_dist.common.errors import InputError
from dnal_dist.distributed.context import Parallel
from dnal_dist.report import records
from dnal_dist.sender import said

# How long W&B tries to start; less than a run waits for that (sender.START_SECONDS).
INIT_SECONDS = 15.0
# W&B keeps what it is told in memory for so long; of its service, when it is killed, no more than that is lost.
FLUSH_SECONDS = 1.0
# How long W&B's service has to end when all is said.
LEAVE_SECONDS = 2.0
NAMES = {"wandb": "W&B", "tensorboard": "TensorBoard"}
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


def require(tracker: str) -> None:
    """Raise InputError if the package of a tracker is missing."""
    if tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "key 'tracking.tracker': tensorboard needs the package tensorboard: pip install 'dnal-dist[tensorboard]'; or "
            "choose wandb or none"
        )


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


def figures(kind: str, values: dict) -> dict[str, float]:
    """The numbers of a record under the names by which trackers show them."""
    if kind == "prune":
        return {f"prune/{key}": v for key, v in costs(values["full"], values["compact"]).items()} | {
            "prune/collapsed": int(values["collapsed"])
        }
    numbers = {key: v for key, v in values.items() if type(v) in (int, float)}
    if kind == "phase":
        return {f"ledger/{values['phase']}/{key}": v for key, v in numbers.items()}
    # Pruning takes no iteration: its evaluation would replace the search's last, at the same step.
    group = "prune" if kind == "eval" and values["phase"] == "prune" else kind
    return {f"{group}/{key}": v for key, v in numbers.items()}


def costs(full: dict, compact: dict) -> dict[str, float]:
    """macs_full, macs_compact, macs_ratio, the same of params, and all of them by the paper's rule."""
    found = {}
    for rule, tail in (("exact", ""), ("paper", "_paper_rule")):
        for unit in ("macs", "params"):
            before, after = full[rule][unit], compact[rule][unit]
            found |= {f"{unit}_full{tail}": before, f"{unit}_compact{tail}": after, f"{unit}_ratio{tail}": after / max(before, 1)}
    return found


def outcome(folder: Path) -> dict[str, float]:
    """The figures of a finished run's table, as result/NAME."""
    run = records.load(folder)
    told = records.summary(run)
    found = {f"accuracy_{phase}": accuracy for phase, accuracy in told["accuracy"].items()}
    if "full" in told and "compact" in told:
        found |= costs(told["full"], told["compact"])
    found |= {f"channels_{key}": number for key, number in told.get("channels", {}).items()}
    spent = run.last("end").get("ledger", {}).values()
    for key in ("images", "device_seconds", "bytes_sent", "energy_kwh"):
        if known := [part[key] for part in spent if key in part]:
            found[key] = sum(known)
    found |= {"seconds": told["seconds"], "collapsed": int(told["collapsed"])}
    return {f"result/{key}": value for key, value in found.items()}


def shown_name(folder: Path, name: str) -> str:
    """A run's name among others: the recipe's and, where it tells more, the run folder's, which the runs of a sweep differ in."""
    own = folder.resolve().name
    # W&B takes no longer ones with what is put behind; the end of a folder's name tells more than its beginning.
    return (own if name in own else f"{name} {own}")[-100:]


def sites_table(full: dict[str, int], kept: dict[str, int]) -> tuple[list[str], list[list]]:
    """Columns and rows of the channels of each site before and after pruning."""
    rows = [[site, channels, kept[site], round(kept[site] / channels, 4)] for site, channels in full.items()]
    return ["site", "channels", "kept", "share"], rows


class Wandb:
    """A W&B run, through Accelerate."""

    def __init__(self, folder: Path, recipe, parallel: Parallel, run_id: str, mode: str):
        self.wandb, self.parallel, self.folder = library(), parallel, folder.resolve()
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
        self.run = self.parallel.start_tracker(self.recipe.tracking.project, self.recipe.model_dump(mode="json"), {"wandb": begin})

    def take(self, kind: str, values: dict, global_step: int, age: int) -> None:
        if kind == "start":
            self.sites = values["sites"]
            self.run.config.update({"start": values}, allow_val_change=True)
            return
        told = figures(kind, values) | self._pictures(kind, values)
        if told:
            # Of what comes at one step W&B keeps the last.
            self.age = max(self.age + 1, age)
            self.run.log(told | {"global_step": global_step}, step=self.age, commit=True)

    def _pictures(self, kind: str, values: dict) -> dict:
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
            self.parallel.stop_tracker()
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


class TensorBoard:
    """Event files in the run folder, through Accelerate."""

    def __init__(self, folder: Path, recipe, parallel: Parallel):
        import torch.utils.tensorboard  # noqa: F401  before loaders are forked, which may wait for a module that is half there

        self.folder, self.recipe, self.parallel, self.sites = folder, recipe, parallel, {}

    def start(self, behind: int) -> None:
        # What was told of later steps is told again, and hidden until then.
        purge = {"purge_step": behind + 1}
        self.writer = self.parallel.start_tracker("tensorboard", None, {"tensorboard": purge})
        settings = self.recipe.model_dump_json(indent=2)
        self.writer.add_text("recipe", "\n".join(f"    {line}" for line in settings.splitlines()), behind)

    def take(self, kind: str, values: dict, global_step: int, _: int) -> None:
        if kind == "start":
            self.sites = values["sites"]
            return
        self.parallel.log(figures(kind, values), global_step)
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
        self.parallel.log(outcome(self.folder), global_step)

    def stop(self) -> None:
        self.parallel.stop_tracker()

    def give_up(self) -> None:
        """Nothing: whatever it waits for is a disk."""
