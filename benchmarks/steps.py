"""Steps of training on the CPU, dnal_dist's own against the published formulation's, taking turns in one process.

    python benchmarks/steps.py                                        about ten minutes on one core
    python benchmarks/steps.py --networks supernet --steps finetune   one of twelve cells
    python benchmarks/steps.py --help

For each network and step: the time of dnal_dist's step in both memory layouts, and of the published formulation's (see
formulation.py), contiguous as its authors' code and in channels_last. They begin with the same weights, and outputs and alpha's
gradients are equal, or nothing is timed. The finetune trains dnal_dist's compact network of 15 % of the MACs, and the formulation's
masked one. Compare within a run only. The same tables on a GPU, with mixed precision and more: gpu.py.
"""

import argparse
import json
from pathlib import Path

import torch
from parts import describe
from stepping import STEPS, Way, measure
from subject import Case, Subject
from tables import derived, schedules, table

NETWORKS = {"mobilenetv2": "mobilenetv2_imagenet", "supernet": "proxyless_supernet", "resnet50": "resnet50_imagenet"}
WAYS = [Way(who, "fp32", layout) for who in ("ours", "formulation") for layout in ("contiguous", "channels_last")]


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
        "--seconds", type=float, default=6.0, help="time for each step in each way, two rounds together (default 6)"
    )
    parser.add_argument("--output", type=Path, help="write the rows to this file as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict] = []
    for name in args.networks:
        subject = Subject(Case(NETWORKS[name], args.batch, args.image_size, args.width))
        for step in args.steps:
            done = len(rows)
            measure(subject, step, WAYS, rows.append, "cpu", args.seconds)
            print("\n".join([*table([derived(row, rows, {}, {}) for row in rows[done:]]), ""]), flush=True)
    print("\n".join(schedules(rows, [])))
    if args.output:
        args.output.write_text(json.dumps({"machine": describe("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
