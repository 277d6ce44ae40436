"""The W&B workspace that shows all runs of a project."""

import json
from typing import NamedTuple


class Lines(NamedTuple):
    """Series over the steps of the run; `series` may be a regular expression."""

    title: str
    series: tuple[str, ...]
    regex: bool = False


class Points(NamedTuple):
    """One point a run: two figures of its summary."""

    title: str
    x: str
    y: str
    log_x: bool = False


class Table(NamedTuple):
    """The last table of each run under this name."""

    title: str
    name: str


SECTIONS: dict[str, tuple[Lines | Points | Table, ...]] = {
    "Accuracy": (
        Lines("accuracy", ("eval/accuracy", "train/accuracy")),
        Lines("accuracy as cut", ("prune/accuracy",)),
        Lines("top-5", ("eval/top5",)),
    ),
    "Loss": (
        Lines("loss", ("train/loss",)),
        Lines("cross-entropy", ("train/cross_entropy", "eval/cross_entropy")),
        Lines("penalty", ("train/penalty",)),
        Lines("learning rate", ("train/learning_rate",)),
    ),
    "Cost against accuracy": (
        Points("share of the MACs", "result/macs_ratio", "result/accuracy_finetune"),
        Points("MACs", "result/macs_compact", "result/accuracy_finetune", log_x=True),
        Points("parameters", "result/params_compact", "result/accuracy_finetune", log_x=True),
        Lines("MACs, expected in the search and kept", ("train/expected_macs", "prune/macs_compact")),
        Lines("parameters, expected in the search and kept", ("train/expected_params", "prune/params_compact")),
    ),
    "Gates": (
        Lines("how hard they are", ("gates/histogram",)),
        Lines("open, of all", ("train/open_share",)),
        Lines("open, site by site", ("gates/open_share/.*",), regex=True),
        Lines("delta", ("train/delta",)),
        Table("channels of each site", "prune/sites"),
    ),
    "Speed and memory": (
        Lines("images a second", ("train/images_per_second",)),
        Lines("waiting for data, seconds", ("train/data_wait_seconds",)),
        Lines("memory of the GPU, bytes", ("train/device_memory_bytes",)),
        Lines("sent by a step, bytes", ("train/comm/bytes_weight_step", "train/comm/bytes_architecture_step")),
        Lines("pause for a checkpoint, seconds", ("checkpoint/pause_seconds",)),
        Points("device time and accuracy", "result/device_seconds", "result/accuracy_finetune"),
    ),
}


def workspace(entity: str, project: str, name: str):
    """The view as wandb_workspaces has it; nothing is sent."""
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=title, panels=[_panel(one) for one in panels], is_open=True) for title, panels in SECTIONS.items()]
    settings = ws.WorkspaceSettings(x_axis="global_step")
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def _panel(panel: Lines | Points | Table):
    import wandb_workspaces.reports.v2 as wr

    if isinstance(panel, Points):
        x, y = wr.SummaryMetric(panel.x), wr.SummaryMetric(panel.y)
        return wr.ScatterPlot(title=panel.title, x=x, y=y, log_x=panel.log_x or None)
    if isinstance(panel, Table):
        return wr.WeavePanelSummaryTable(table_name=panel.name)
    if panel.regex:
        return wr.LinePlot(title=panel.title, x="global_step", metric_regex="|".join(panel.series))
    return wr.LinePlot(title=panel.title, x="global_step", y=list(panel.series))


def spec(view) -> dict:
    """What would be sent of a view, as JSON has it."""
    return json.loads(view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
