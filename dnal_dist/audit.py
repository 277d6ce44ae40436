"""Does a run's record prove that every epoch had each sample once, in the order that its seed and number give?"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dnal_dist import recipe
from dnal_dist.receipts import tally
from dnal_dist.recipe import InputError
from dnal_dist.shards import Shards
from dnal_dist.stream import Slices


class Taken(NamedTuple):
    name: str
    position: int


def audit(run: Path) -> int:
    """Print what each receipt of the run folder `run` proves. Returns 0 if all are right and follow on one another, else 1.

    Raises InputError if folder or shards cannot be read.
    """
    settings = recipe.load(run / "recipe.yaml")
    receipts, last = _read(run)
    if not receipts:
        raise InputError(f"{run / 'metrics.jsonl'}: no receipt yet; the first is written at the end of the first epoch")
    console, data = Console(), settings.data
    shards = Shards(data.train, "data.train", None, data.cache, data.cache_gb)
    slices = Slices(shards, data, settings.seed, True)
    bar = {"console": Console(stderr=True), "transient": True, "disable": not console.is_terminal}
    names = [shards.name(index) for index in track(range(shards.samples), "reading keys", **bar)]
    numbers = {(Path(shard).name, offset): index for index in range(shards.samples) for shard, offset in [shards.where(index)]}
    table = Table("epoch", "batches", "samples", "skipped", "", title=f"{run}: receipts against {data.train}")
    faults = 0
    for epoch, receipt in enumerate(track(receipts, "checking epochs", **bar)):
        fault = _fault(receipt, epoch, epoch == len(receipts) - 1, names, numbers, slices)
        faults += bool(fault)
        table.add_row(
            *(str(receipt[key]) for key in ("epoch", "batches", "samples")),
            str(len(receipt["skipped"])),
            f"[red]{fault}" if fault else "each sample once, in its turn",
        )
    console.print(table)
    _tell_skipped(console, receipts)
    per_epoch, dropped = divmod(shards.samples, data.global_batch)
    covered = (len(receipts) - 1) * per_epoch + receipts[-1]["batches"]
    console.print(
        f"{covered} batches of {data.global_batch}, {dropped} samples left over in each epoch; "
        + (f"[red]{faults} receipts are wrong" if faults else "no sample twice, none missing")
        + (f"; the last {last - covered} iterations are of an epoch that has not ended" if last > covered else "")
    )
    return 1 if faults else 0


def _read(run: Path) -> tuple[list[dict], int]:
    """A run's receipts, oldest first, and the number of iterations that its record tells of."""
    try:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [one for one in records if one["kind"] == "receipt"], max((one["global_step"] for one in records), default=0)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{run / 'metrics.jsonl'}: not a run's record ({error}); name a run folder") from None


def _fault(receipt: dict, epoch: int, is_last: bool, names: list[str], numbers: dict, slices: Slices) -> str:
    """What is wrong with the receipt of `epoch`; "" if nothing is."""
    batches, skipped = receipt["batches"], [(shard, offset) for shard, offset, *_ in receipt["skipped"]]
    per_epoch = len(names) // slices.global_batch
    if receipt["epoch"] != epoch:
        return f"expected the receipt of epoch {epoch}"
    if not 0 < batches <= per_epoch or (batches < per_epoch and not is_last):
        return f"{batches} batches, expected {per_epoch}"
    if unknown := [one for one in skipped if one not in numbers]:
        return f"skipped what the shards do not hold: {unknown[0][0]} at byte {unknown[0][1]}"
    wanted: np.ndarray = slices.order(epoch)[: batches * slices.global_batch]
    left_out = {numbers[one] for one in skipped}
    taken = [(index, position) for position, index in enumerate(wanted.tolist()) if index not in left_out]
    if len(left_out) != len(skipped) or len(taken) != receipt["samples"] or len(taken) + len(skipped) != len(wanted):
        return f"{receipt['samples']} samples and {len(skipped)} skipped, expected {len(wanted)} in all"
    digest, ordered = (f"{one:032x}" for one in tally(Taken(names[index], position) for index, position in taken))
    if digest != receipt["digest"]:
        return "other samples than the epoch's, or not each of them once"
    return "" if ordered == receipt["ordered"] else "the samples of the epoch, but in another order"


def _tell_skipped(console: Console, receipts: list[dict]) -> None:
    found = {(shard, offset): (key, reason) for receipt in receipts for shard, offset, key, reason in receipt["skipped"]}
    if not found:
        return
    table = Table("shard", "byte", "key", "why", title=f"{len(found)} samples were skipped")
    for (shard, offset), (key, reason) in sorted(found.items()):
        table.add_row(shard, str(offset), str(key), reason)
    console.print(table)
