"""Budgets on the digits: does every run land within 1 % below what it was asked for, and how does it compare with a tuned penalty?

    python -m data_tools.make_shards digits data/digits
    python benchmarks/budgets.py --jobs 2           about half an hour on two cores

`budget` is recipes/digits.yaml with architecture.target in place of its penalty weight: three networks, three budgets, two seeds.
`by hand` is what someone without it would do: each network with each weight of a ladder, and for each budget the weight whose runs
cost the nearest to it on average. Every result is appended to OUTPUT/results.jsonl; what is there already is not run again.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import statistics
import sys
from pathlib import Path

import torch

from dnal_dist import nets, recipe
from dnal_dist.common import errors
from dnal_dist.distributed.context import Context
from dnal_dist.report import records
from dnal_dist.training import phases, setup

NETWORKS = [name for name in ("vgg_digits", "resnet_digits", "supernet_digits") if name in nets.NETWORKS]
BUDGETS = ("0.5x", "0.25x", "0.1x")
LADDER = (0.005, 0.01, 0.02, 0.03, 0.04)
MARKS = ("<!-- table -->", "<!-- end of table -->")


def run(job: tuple) -> dict:
    """One training run. job: network, seed, "target.macs" or "penalty_weight", its value, the folder of results, overrides."""
    network, seed, key, value, output, overrides = job
    torch.set_num_threads(1)
    folder = output / "runs" / f"{network}-{key}-{value}-{seed}"
    own = [f"model.name={network}", f"seed={seed}", f"architecture.{key}={value}", f"output={folder}", "tracking.tracker=none"]
    with contextlib.redirect_stdout(io.StringIO()):
        state = setup.prepare(recipe.load("recipes/digits.yaml", [*overrides, *own]), Context(), overwrite=True)
        phases.train(state)
    found = records.summary(folder)
    costs = {"macs": found["compact"]["exact"]["macs"], "full_macs": found["full"]["exact"]["macs"]}
    result = {"network": network, "seed": seed, "key": key, "value": value, "accuracy": found["accuracy"]["finetune"], **costs}
    return result | {"collapsed": found["collapsed"], "seconds": found["seconds"]}


def results(output: Path) -> list[dict]:
    path = output / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(found: list[dict]) -> str:
    lines = [
        "| network | budget | used of it | accuracy | by hand: weight | cost | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for network, text in itertools.product(NETWORKS, BUDGETS):
        share = recipe.amount(text)[0]
        asked = [r for r in found if (r["network"], r["value"]) == (network, text)]
        rungs = {w: [r for r in found if (r["network"], r["key"], r["value"]) == (network, "penalty_weight", w)] for w in LADDER}
        rungs = {weight: runs for weight, runs in rungs.items() if runs}
        if not asked:
            continue
        used = [100 * r["macs"] / int(share * r["full_macs"]) for r in asked]
        row = [network, f"{share:.0%}", ", ".join(f"{u:.2f} %" for u in used), accuracies(asked)]
        if not rungs:
            row += [""] * 3
        else:
            weight = min(rungs, key=lambda w: abs(math.log(statistics.mean(map(cost_share, rungs[w])) / share)))
            costs = ", ".join(f"{cost_share(r):.1%}" for r in rungs[weight])
            row += [f"{weight:g}", costs, accuracies(rungs[weight])]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def cost_share(result: dict) -> float:
    return result["macs"] / result["full_macs"]


def accuracies(found: list[dict]) -> str:
    return ", ".join(f"{r['accuracy']:.2%}" for r in found)


def missed(found: list[dict]) -> list[dict]:
    """Runs after a budget that are above it, or more than 1 % below."""
    asked = [r for r in found if r["key"] == "target.macs"]
    return [r for r in asked if not 0.99 <= r["macs"] / int(recipe.amount(r["value"])[0] * r["full_macs"]) <= 1]


def write(found: list[dict], page: Path) -> None:
    """The table between its two marks in `page`, which is otherwise left alone."""
    text = page.read_text()
    before, rest = text.split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--output", type=Path, default=Path("runs/budgets"))
    parser.add_argument("--docs", type=Path, help="only write the table into this page, from the results that there are")
    args = parser.parse_intermixed_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.docs:
        write(results(args.output), args.docs)
        return
    asked = [("target.macs", text) for text in BUDGETS] + [("penalty_weight", weight) for weight in LADDER]
    done = {(r["network"], r["seed"], r["key"], r["value"]) for r in results(args.output)}
    jobs = [(n, s, *a, args.output, args.overrides) for a in asked for n in args.networks for s in args.seeds]
    jobs = [job for job in jobs if job[:4] not in done]
    try:
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool, (args.output / "results.jsonl").open("a") as file:
            for result in pool.imap(run, jobs):
                file.write(json.dumps(result) + "\n")
                file.flush()
                of = f"{result['macs'] / result['full_macs']:.2%} of the MACs, {result['accuracy']:.2%}"
                print(f"{result['network']} seed {result['seed']} {result['key']}={result['value']}: {of}", flush=True)
    except errors.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    found = results(args.output)
    print(table(found))
    if bad := missed(found):
        print(f"error: {len(bad)} runs missed their budget: {bad}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
