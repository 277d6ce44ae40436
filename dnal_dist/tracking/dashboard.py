"""The W&B workspace that shows all runs of a project."""

import json
from typing import NamedTuple


class Lines(NamedTuple):
    """Metrics over the steps of the run; each may be a regular expression."""

    title: str
    metrics: tuple[str, ...]
    regex: bool = False


class Points(NamedTuple):
    """One point a run: two metrics (x, y) of its summary."""

    title: str
    metrics: tuple[str, str]
    log_x: bool = False


class Table(NamedTuple):
    """The last table of each run under this name."""

    title: str
    metrics: tuple[str]


SECTIONS: dict[str, tuple[Lines | Points | Table, ...]] = {
    "Accuracy": (
        Lines("accuracy", ("eval/accuracy", "train/accuracy")),
        Lines("accuracy after pruning", ("prune/accuracy",)),
        Lines("top-5", ("eval/top5",)),
    ),
    "Loss": (
        Lines("loss", ("train/loss",)),
        Lines("cross-entropy", ("train/cross_entropy", "eval/cross_entropy")),
        Lines("penalty", ("train/penalty",)),
        Lines("learning rate", ("train/learning_rate",)),
    ),
    "Cost against accuracy": (
        Points("fraction of the MACs", ("result/macs_ratio", "result/accuracy_finetune")),
        Points("MACs", ("result/macs_compact", "result/accuracy_finetune"), log_x=True),
        Points("parameters", ("result/params_compact", "result/accuracy_finetune"), log_x=True),
        Lines("MACs, expected in the search and compact", ("train/expected_macs", "prune/macs_compact")),
        Lines("parameters, expected in the search and compact", ("train/expected_params", "prune/params_compact")),
    ),
    "Gates": (
        Lines("hardness", ("gates/histogram",)),
        Lines("open fraction", ("train/open_share",)),
        Lines("open fraction by site", ("gates/open_share/.*",), regex=True),
        Lines("delta", ("train/delta",)),
        Table("channels of each site", ("prune/sites",)),
    ),
    "Speed and memory": (
        Lines("images per second", ("train/images_per_second",)),
        Lines("data wait, seconds", ("train/data_wait_seconds",)),
        Lines("GPU memory, bytes", ("train/device_memory_bytes",)),
        Lines("bytes sent by a step", ("train/comm/bytes_weight_step", "train/comm/bytes_architecture_step")),
        Lines("pause for a checkpoint, seconds", ("checkpoint/pause_seconds",)),
        Points("device time and accuracy", ("result/device_seconds", "result/accuracy_finetune")),
    ),
}


def workspace(entity: str, project: str, name: str):
    """A view of all SECTIONS, as a wandb_workspaces object; nothing is sent."""
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=title, panels=[_panel(one) for one in panels], is_open=True) for title, panels in SECTIONS.items()]
    settings = ws.WorkspaceSettings(x_axis="global_step")
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def _panel(panel: Lines | Points | Table):
    import wandb_workspaces.reports.v2 as wr

    if isinstance(panel, Points):
        x, y = map(wr.SummaryMetric, panel.metrics)
        return wr.ScatterPlot(title=panel.title, x=x, y=y, log_x=panel.log_x or None)
    if isinstance(panel, Table):
        return wr.WeavePanelSummaryTable(table_name=panel.metrics[0])
    if panel.regex:
        return wr.LinePlot(title=panel.title, x="global_step", metric_regex="|".join(panel.metrics))
    return wr.LinePlot(title=panel.title, x="global_step", y=list(panel.metrics))


def spec(view) -> dict:
    """The definition of a view as JSON, as W&B receives it."""
    return json.loads(view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
