"""Made-up runs of several seeds, and what a comparison says of them."""

import csv
import io
import subprocess
import sys

import yaml
from made_up import changed, made_up_run, save
from rich.console import Console

from dnal_dist.report import comparison, comparison_files, outputs

ACCURACIES = {1e-4: (0.9375, 0.9381, 0.9369), 4e-4: (0.8990, 0.9012, 0.8995)}
MACS = {1e-4: (160_000_000, 162_500_000, 161_000_000), 4e-4: (22_000_000, 22_500_000, 22_100_000)}


def cost(macs: int) -> dict:
    return {rule: {"macs": macs, "params": macs // 100} for rule in ("exact", "paper")}


def recipe(weight: float = 1e-4, seed: int = 0, **more) -> dict:
    data = {"image_size": 32, "val": "cifar/val.tar"}
    return {
        "name": "vgg",
        "seed": seed,
        "model": {"name": "vgg16_cifar"},
        "architecture": {"penalty_weight": weight},
        "data": data,
    } | more


def run_of(folder, settings: dict, accuracy: float = 0.9, macs: int = 10**8, val: int = 10_000, records=None, **start):
    """A made-up run of VGG16 on CIFAR-10, with this accuracy and cost at its end."""
    records = made_up_run() if records is None else records
    records = changed(records, "start", **{"full": cost(313_472_778), "train_samples": 50_000, "val_samples": val} | start)
    records = changed(records, "prune", full=cost(313_472_778), compact=cost(macs))
    records = [r | {"accuracy": accuracy} if r["kind"] == "eval" and r["phase"] == "finetune" else r for r in records]
    return save(folder, records, recipe=yaml.safe_dump(settings))


def printed(*given) -> tuple[str, list[dict]]:
    """What is printed, and the lines of comparison.csv."""
    found, out = comparison.compare(given), io.StringIO()
    console = Console(file=out, width=80)
    comparison_files.show(found, found.parent, outputs.printer(console))
    return out.getvalue(), list(csv.DictReader(io.StringIO(comparison_files.as_csv(found))))


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dnal_dist.report", *map(str, arguments)], capture_output=True, text=True)
