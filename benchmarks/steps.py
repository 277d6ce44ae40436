"""Steps of training on the CPU: dnal_dist's own, the published formulation's and a floor, taking turns in one process.

    python benchmarks/steps.py                                        about fifteen minutes on one core
    python benchmarks/steps.py --networks supernet --steps finetune   one of twelve cells
    make bench                                                        a short form
    python benchmarks/steps.py --help

For each network and step: the time of dnal_dist's step in both memory layouts, of the published formulation's (see formulation.py),
contiguous as its authors' code and in channels_last, and of the bare convolutions and products of dnal_dist's network. All begin
with the same weights, and outputs and alpha's gradients are equal, or nothing is timed. The finetune trains dnal_dist's compact
network of 15 % of the MACs, and the formulation's masked one. The last table has a row for each step: ours in the layout that a run
takes by itself, the formulation as its authors' code and in its better layout, and the floor in the better one. With one thread the
time is the processor's. Compare within a run only. The same tables on a GPU, with mixed precision and more: gpu.py.
"""

import argparse
import json
from pathlib import Path

import torch
from parts import describe
from stepping import STEPS, Way, measure
from subject import Case, Subject
from tables import derived, schedules, table

from dnal_dist import nets
from dnal_dist.distributed.context import Context
from dnal_dist.recipe import Training

NETWORKS = {"mobilenetv2": "mobilenetv2_imagenet", "supernet": "proxyless_supernet", "resnet50": "resnet50_imagenet"}
LAYOUTS = ("contiguous", "channels_last")
WAYS = [Way(who, "fp32", layout) for who in ("ours", "formulation", "floor") for layout in LAYOUTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=f"some of: {', '.join(STEPS)}"
    )
    parser.add_argument("--batch", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--image-size", type=int, default=96, help="pixels (default 96)")
    parser.add_argument("--width", type=float, default=1.0, help="factor of channels (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="time for each step in each way, three rounds together (default 6)"
    )
    parser.add_argument("--output", type=Path, help="write the rows to this file as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict] = []
    for name in args.networks:
        subject = Subject(Case(NETWORKS[name], args.batch, args.image_size, args.width))
        for step in args.steps:
            done = len(rows)
            measure(subject, step, WAYS, rows.append, "cpu", args.seconds, rounds=3)
            print("\n".join([*table([derived(row, rows, {}, {}) for row in rows[done:]]), ""]), flush=True)
    print("\n".join(schedules(rows, [])))
    print("\n".join(table(summary(rows))))
    if args.output:
        args.output.write_text(json.dumps({"machine": describe("cpu"), "rows": rows}, indent=1) + "\n")


def summary(rows: list[dict]) -> list[dict]:
    """For each network and step: milliseconds of ours, of the formulation and of the floor, and what they are to each other."""
    found: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for row in rows:
        if "ms" in row:
            found.setdefault((row["network"], row["step"]), {})[row["who"], row["layout"]] = row["ms"]
    lines = []
    for (network, step), ms in found.items():
        if len(ms) < len(WAYS):
            continue
        context = Context()
        context.tune(Training(), nets.build(network))
        ours, theirs = ms["ours", context.layout], [ms["formulation", layout] for layout in LAYOUTS]
        floor = min(ms["floor", layout] for layout in LAYOUTS)
        line = {"network": network, "step": step, "layout": context.layout, "ours, ms": ours, "formulation, ms": theirs[0]}
        line |= {"floor, ms": floor, "x formulation": f"{theirs[0] / ours:.2f}"}
        line |= {"x its better layout": f"{min(theirs) / ours:.2f}", "x the floor": f"{ours / floor:.2f}"}
        lines.append(line)
    return lines


if __name__ == "__main__":
    main()
