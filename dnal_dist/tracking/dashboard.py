"""The W&B workspace that shows all runs of a project."""

import json
from typing import NamedTuple


class Panel(NamedTuple):
    """kind: "lines" of metrics over the steps; "regex", likewise of all metrics that match; "points" or "log points", one a
    run at two metrics of its summary; "table", the last one of each run under this name."""

    title: str
    metrics: tuple[str, ...]
    kind: str = "lines"


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Accuracy": (
        Panel("accuracy", ("eval/accuracy", "train/accuracy")),
        Panel("accuracy after pruning", ("prune/accuracy",)),
        Panel("top-5", ("eval/top5",)),
        Panel("mean over classes", ("eval/balanced_accuracy",)),
    ),
    "Loss": (
        Panel("loss", ("train/loss",)),
        Panel("cross-entropy", ("train/cross_entropy", "eval/cross_entropy")),
        Panel("penalty", ("train/penalty",)),
        Panel("learning rate", ("train/learning_rate",)),
    ),
    "Cost against accuracy": (
        Panel("fraction of the MACs", ("result/macs_ratio", "result/accuracy_finetune"), "points"),
        Panel("MACs", ("result/macs_compact", "result/accuracy_finetune"), "log points"),
        Panel("parameters", ("result/params_compact", "result/accuracy_finetune"), "log points"),
        Panel("MACs, expected in the search and compact", ("train/expected_macs", "prune/macs_compact")),
        Panel("parameters, expected in the search and compact", ("train/expected_params", "prune/params_compact")),
    ),
    "Gates": (
        Panel("hardness", ("gates/histogram",)),
        Panel("open fraction", ("train/open_share",)),
        Panel("open fraction by site", ("gates/open_share/.*",), "regex"),
        Panel("delta", ("train/delta",)),
        Panel("channels of each site", ("prune/sites",), "table"),
    ),
    "Speed and memory": (
        Panel("images per second", ("train/images_per_second",)),
        Panel("data wait, seconds", ("train/data_wait_seconds",)),
        Panel("GPU memory, bytes", ("train/device_memory_bytes",)),
        Panel("bytes sent by a step", ("train/comm/bytes_weight_step", "train/comm/bytes_architecture_step")),
        Panel("pause for a checkpoint, seconds", ("checkpoint/pause_seconds",)),
        Panel("device time and accuracy", ("result/device_seconds", "result/accuracy_finetune"), "points"),
    ),
}


def workspace(entity: str, project: str, name: str):
    """A view of all SECTIONS, as a wandb_workspaces object; nothing is sent."""
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=title, panels=[_panel(one) for one in panels], is_open=True) for title, panels in SECTIONS.items()]
    settings = ws.WorkspaceSettings(x_axis="global_step")
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def _panel(panel: Panel):
    import wandb_workspaces.reports.v2 as wr

    title, metrics, kind = panel
    if kind.endswith("points"):
        x, y = map(wr.SummaryMetric, metrics)
        return wr.ScatterPlot(title=title, x=x, y=y, log_x=kind.startswith("log") or None)
    if kind == "table":
        return wr.WeavePanelSummaryTable(table_name=metrics[0])
    what = {"metric_regex": "|".join(metrics)} if kind == "regex" else {"y": list(metrics)}
    return wr.LinePlot(title=title, x="global_step", **what)


def spec(view) -> dict:
    """The definition of a view as JSON, as W&B receives it."""
    return json.loads(view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
