"""Latency budgets on the digits: is every network, measured again after its run, within 5 % below what was asked for, and how does
it compare with a budget of MACs whose network takes as long?

    python -m data_tools.make_shards digits data/digits
    python benchmarks/latency_budgets.py                      about half an hour on two cores

Each network is trained by recipes/digits.yaml towards a share of the full network's latency in ONNX Runtime (batch 16, one thread),
and towards each of several budgets of MACs. What is in OUTPUT already is not run again.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import torch
from budgets import NETWORKS

from dnal_dist import recipe
from dnal_dist.distributed.context import Context
from dnal_dist.report import records
from dnal_dist.training import phases, setup

TARGET, MACS = "0.5x", ("0.35x", "0.25x", "0.15x")
LATENCY = ["--runtime", "onnx", "--batch", "16"]


def door(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", "dnal_dist.latency", *words], check=True, capture_output=True, text=True).stdout


def run(network: str, asked: str, target: str, output: Path, overrides: list[str]) -> dict:
    """One training run, and its network's latency as measured afterwards in a process of its own."""
    folder = output / f"{network}-{asked}"
    own = [f"model.name={network}", f"architecture.target={target}", f"output={folder}"]
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        state = setup.prepare(
            recipe.load("recipes/digits.yaml", [*overrides, *own, "tracking.tracker=none"]), Context(), overwrite=True
        )
        phases.train(state)
    found = records.summary(folder)
    (row,) = json.loads(door(str(folder), *LATENCY, "--seconds", "10", "--json"))["rows"]
    costs = {"macs": found["compact"]["exact"]["macs"] / found["full"]["exact"]["macs"], "latency": 1 / row["faster"]["compact"]}
    return {"network": network, "asked": asked, "accuracy": found["accuracy"]["finetune"], "budget": found["budget"], **costs}


def table(found: list[dict]) -> str:
    names = ("network", "asked for", "measured when pruned", "measured again", "MACs", "accuracy")
    names += ("MACs budget of equal latency", "measured", "accuracy")
    lines = [f"| {' | '.join(names)} |", "|---" + "|--:" * (len(names) - 1) + "|"]
    for network in NETWORKS:
        rows = [row for row in found if row["network"] == network]
        for own in (row for row in rows if row["asked"].startswith("latency")):
            others = [row for row in rows if row["asked"].startswith("macs")]
            equal = min(others, key=lambda row: abs(row["latency"] - own["latency"]), default=None)
            share = float(own["asked"].split("-")[1].removesuffix("x"))
            cells = [
                network,
                f"{share:.2f}x",
                f"{share * own['budget']['used'] / own['budget']['most']:.3f}x",
                f"{own['latency']:.3f}x",
            ]
            cells += [f"{own['macs']:.1%}", f"{own['accuracy']:.2%}"]
            cells += [f"{equal['macs']:.1%}", f"{equal['latency']:.3f}x", f"{equal['accuracy']:.2%}"] if equal else [""] * 3
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--target", default=TARGET, help=f"share of the full network's latency ({TARGET})")
    parser.add_argument("--output", type=Path, default=Path("runs/latency_budgets"))
    args = parser.parse_intermixed_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "results.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for network in args.networks:
        times = args.output / f"{network}.json"
        door("recipes/digits.yaml", f"model.name={network}", *args.overrides, "--profile", str(times), *LATENCY)
        asked = {f"latency-{args.target}": f"{{latency: {args.target}, table: {times}}}"}
        asked |= {f"macs-{share}": f"{{macs: {share}}}" for share in MACS}
        for name, target in asked.items():
            if not any((row["network"], row["asked"]) == (network, name) for row in found):
                found.append(run(network, name, target, args.output, args.overrides))
                with path.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
                print(found[-1], flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
