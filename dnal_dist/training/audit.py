"""Does a run's record prove that every epoch had the samples that its seed and number give, in their order?"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.common.text import printable
from dnal_dist.data.order import GlobalOrder
from dnal_dist.data.receipts import tally
from dnal_dist.data.shards import Shards
from dnal_dist.report import records

KEYS = ("epoch", "batches", "samples", "digest", "ordered", "skipped")


class Taken(NamedTuple):
    name: str
    position: int


def audit(run: Path) -> int:
    """Print what each receipt of the run folder `run` proves. Returns 0 if all are right and follow on one another, else 1.

    Raises InputError if folder or shards cannot be read.
    """
    settings = recipe.load(run / "recipe.yaml")
    receipts, last, ended = _read(run)
    if not receipts:
        raise InputError(f"{run / 'metrics.jsonl'}: no receipt yet; the first is written at the end of the first epoch")
    console, data = Console(), settings.data
    shards = Shards(data.train, "data.train", None, data)
    order = GlobalOrder(shards, data, settings.seed, True)
    bar = {"console": Console(stderr=True), "transient": True, "disable": not console.is_terminal}
    names = [shards.name(index) for index in track(range(shards.samples), "reading keys", **bar)]
    table = Table("epoch", "batches", "samples", "skipped", "", title=escape(f"{run}: receipts against {data.train}"))
    per_epoch, dropped = divmod(shards.samples, data.global_batch)
    faults, right = 0, f"each sample {'once' if order.is_plain else 'as often as the recipe says'}, in its turn"
    proven = f"no sample {'twice' if order.is_plain else 'too often'}, none missing"
    for epoch, receipt in enumerate(track(receipts, "checking epochs", **bar)):
        fault = _fault(receipt, epoch, epoch == len(receipts) - 1, names, order)
        faults += bool(fault)
        numbers = (str(number) for number in (epoch, receipt["batches"], receipt["samples"], len(receipt["skipped"])))
        table.add_row(*numbers, f"[red]{escape(printable(fault))}" if fault else right)
    console.print(table)
    _tell_skipped(console, receipts)
    covered = (len(receipts) - 1) * per_epoch + receipts[-1]["batches"]
    missing = last - covered if ended or last - covered >= per_epoch else 0
    console.print(
        f"{covered} batches of {data.global_batch}{f', {dropped} samples left over in each epoch' if order.is_plain else ''}; "
        + (f"[red]{faults} receipts are wrong" if faults else proven)
        + (f"; [red]the receipts of the last {missing} iterations are missing" if missing else "")
        + (f"; the last {last - covered} iterations are of an epoch that has not ended" if last > covered and not missing else "")
    )
    return 1 if faults or missing else 0


def _read(run: Path) -> tuple[list[dict], int, bool]:
    """A run's receipts, oldest first, the number of iterations that its record tells of, and whether it has ended."""
    found = records.load(run)
    receipts = found.of("receipt", has=KEYS)
    rows = [row for one in receipts for row in one["skipped"]]
    whole = len(receipts) == len(found.of("receipt")) and all(len(row) == 5 and isinstance(row[0], int) for row in rows)
    if found.faults or not whole:
        why = found.faults or "an unreadable receipt"
        raise InputError(f"{run / 'metrics.jsonl'}: not a run's record ({why}); name a run folder")
    return receipts, max(one.get("global_step", 0) for one in found.records), bool(found.last("end"))


def _fault(receipt: dict, epoch: int, is_last: bool, names: list[str], order: GlobalOrder) -> str:
    """What is wrong with the receipt of `epoch`; "" if nothing is."""
    batches, skipped = receipt["batches"], Counter(one[0] for one in receipt["skipped"])
    per_epoch = len(names) // order.global_batch
    if receipt["epoch"] != epoch:
        return f"expected the receipt of epoch {epoch}"
    if not 0 < batches <= per_epoch or (batches < per_epoch and not is_last):
        return f"{batches} batches, expected {per_epoch}"
    wanted: np.ndarray = order.epoch(epoch)[: batches * order.global_batch]
    taken = [Taken(names[index], position) for position, index in enumerate(wanted.tolist()) if index not in skipped]
    if skipped != Counter(index for index in wanted.tolist() if index in skipped) or len(taken) != receipt["samples"]:
        return f"{receipt['samples']} samples and {len(receipt['skipped'])} skipped, expected {len(wanted)} in all"
    digest, ordered = (f"{one:032x}" for one in tally(taken))
    if digest != receipt["digest"]:
        return "other samples than the epoch's, or not as often"
    return "" if ordered == receipt["ordered"] else "the samples of the epoch, but in another order"


def _tell_skipped(console: Console, receipts: list[dict]) -> None:
    found = {one[0]: one[1:] for receipt in receipts for one in receipt["skipped"]}
    if not found:
        return
    table = Table("shard", "byte", "key", "why", title=f"{len(found)} samples were skipped")
    for _, told in sorted(found.items()):
        table.add_row(*(escape(printable(str(one))) for one in told))
    console.print(table)
