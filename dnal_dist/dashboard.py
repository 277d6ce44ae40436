"""Lay out the panels of a W&B project: a saved view of its workspace, with panels for all metrics of a run.

python -m dnal_dist.dashboard --entity my-team --project dnal_dist              # save the view, and print its address
python -m dnal_dist.dashboard --entity my-team --project dnal_dist --dry-run    # list the panels; nothing is sent
python -m dnal_dist.dashboard --entity my-team --project dnal_dist --json       # print the whole definition; nothing is sent

The entity is the user or team at W&B that owns the project; the project is tracking.project of the recipes. Saving
needs `wandb login` (or WANDB_API_KEY) and the package wandb-workspaces: pip install 'dnal-dist[dashboard]'. Each save makes a
new view; the workspace and its other views stay unchanged.
"""

import importlib.util
import json

from dnal_dist.common.door import door, parser_of
from dnal_dist.common.errors import InputError, reason
from dnal_dist.tracking.dashboard import SECTIONS, spec, workspace


@door
def main() -> None:
    parser = parser_of("dnal_dist.dashboard", __doc__)
    parser.add_argument("--entity", required=True, help="user or team at W&B")
    parser.add_argument("--project", required=True, help="project at W&B, tracking.project of the recipes")
    parser.add_argument("--name", default="dnal_dist", help="name of the view (default: dnal_dist)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list sections and panels; nothing is sent")
    what.add_argument("--json", action="store_true", help="print the definition as JSON; nothing is sent")
    args = parser.parse_args()
    if args.dry_run:
        for title, panels in SECTIONS.items():
            print(title, *(f"  {panel.title}: {', '.join(panel.metrics)}" for panel in panels), sep="\n")
        return
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise InputError("the package wandb-workspaces is missing: pip install 'dnal-dist[dashboard]'")
    view = workspace(args.entity, args.project, args.name)
    if args.json:
        print(json.dumps(spec(view), indent=2))
        return
    _save(view)


def _save(view) -> None:
    from dnal_dist.tracking.wandb import logged_in

    if not logged_in():
        raise InputError("W&B finds no API key: use `wandb login`, or set WANDB_API_KEY; --dry-run and --json need none")
    try:
        view.save()
    except Exception as error:
        why = f"W&B did not take the view ({reason(error)})"
        raise InputError(f"{why}; see that {view.entity}/{view.project} exists and is yours") from None
    print(view.url)


if __name__ == "__main__":
    main()
