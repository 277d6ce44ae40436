"""Lay out the panels of a W&B project: a saved view of its workspace, with what runs of this project tell.

python -m dnal_dist.dashboard --entity my-team --project dnal_dist              save the view, and print its address
python -m dnal_dist.dashboard --entity my-team --project dnal_dist --dry-run    list the panels; nothing is sent
python -m dnal_dist.dashboard --entity my-team --project dnal_dist --json       print the whole definition; nothing is sent

The entity is the user or team under which the project stands at W&B, the project what recipes name as tracking.project. Saving
needs `wandb login` (or WANDB_API_KEY) and the package wandb-workspaces: pip install 'dnal-dist[dashboard]'. Each save makes a view
of its own; the workspace and views that are there stay as they are.
"""

import argparse
import importlib.util
import json
import sys
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
        Points("share of the multiply-adds", "result/macs_ratio", "result/accuracy_finetune"),
        Points("multiply-adds", "result/macs_compact", "result/accuracy_finetune", log_x=True),
        Points("parameters", "result/params_compact", "result/accuracy_finetune", log_x=True),
        Lines("multiply-adds, expected in the search and kept", ("train/expected_macs", "prune/macs_compact")),
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
        Lines("pictures a second", ("train/images_per_second",)),
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


def main() -> None:
    """Command line: exit code 2 and one line on stderr if the view cannot be built or saved."""
    parser = argparse.ArgumentParser(
        prog="python -m dnal_dist.dashboard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", required=True, help="user or team at W&B")
    parser.add_argument("--project", required=True, help="project at W&B, what recipes name as tracking.project")
    parser.add_argument("--name", default="dnal_dist", help="what the view is called there (dnal_dist)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list sections and panels; nothing is sent")
    what.add_argument("--json", action="store_true", help="print the definition as JSON; nothing is sent")
    args = parser.parse_args()
    if args.dry_run:
        for title, panels in SECTIONS.items():
            print(title, *(f"  {panel.title}: {', '.join(_shown(panel))}" for panel in panels), sep="\n")
        return
    if importlib.util.find_spec("wandb_workspaces") is None:
        _fail("the package wandb-workspaces is missing: pip install 'dnal-dist[dashboard]'")
    view = workspace(args.entity, args.project, args.name)
    if args.json:
        print(json.dumps(spec(view), indent=2))
        return
    _save(view)


def _shown(panel: Lines | Points | Table) -> tuple[str, ...]:
    """Names of what a panel shows."""
    if isinstance(panel, Lines):
        return panel.series
    return (panel.x, panel.y) if isinstance(panel, Points) else (panel.name,)


def _save(view) -> None:
    from dnal_dist.trackers import logged_in

    if not logged_in():
        _fail("W&B finds no API key: use `wandb login`, or set WANDB_API_KEY; --dry-run and --json need none")
    try:
        view.save()
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        _fail(f"W&B did not take the view ({why}); see that {view.entity}/{view.project} is there and yours")
    print(view.url)


def _fail(why: str) -> None:
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
