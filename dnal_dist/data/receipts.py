"""Receipts: digests of which samples each epoch consumed, and in which order, on however many processes.

A sample is known by its shard's number and file name, the byte where it begins, and its key. The digest of an epoch is the sum of
its samples' hashes, so it does not depend on who took which; the ordered digest sums hashes of each sample together with its
position in the epoch's global order. Both add up over processes, and over the parts of an epoch that a run was stopped in.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

from dnal_dist.data.samples import Fault

WIDTH = 16
MODULUS = 1 << 8 * WIDTH


class Named(Protocol):
    """A sample: its name, and its position in its epoch's order."""

    name: str
    position: int


def tally(samples: Iterable[Named]) -> tuple[int, int]:
    """Sums of the samples' hashes, and of their hashes together with their positions: what `Receipt` adds up."""
    plain = ordered = 0
    for sample in samples:
        encoded, position = sample.name.encode("utf-8", "surrogateescape"), sample.position.to_bytes(8)
        plain += int.from_bytes(blake2b(encoded, digest_size=WIDTH).digest())
        ordered += int.from_bytes(blake2b(encoded, digest_size=WIDTH, salt=position).digest())
    return plain % MODULUS, ordered % MODULUS


def without(whole: tuple[int, int], samples: Iterable[Named]) -> tuple[int, int]:
    """The tally `whole` less that of `samples`, which are part of it."""
    part = tally(samples)
    return (whole[0] - part[0]) % MODULUS, (whole[1] - part[1]) % MODULUS


@dataclass
class Receipt:
    """What was consumed of an epoch: its first `batches` global batches, `samples` samples in all. skipped: [number, shard, byte,
    key, why] of each that could not be used. class_counts: samples of each class, where they are counted. Between two calls of
    `settle`, the main process holds more than its own part, others less."""

    epoch: int = 0
    batches: int = 0
    samples: int = 0
    digest: int = 0
    ordered: int = 0
    skipped: list[list] = field(default_factory=list)
    class_counts: list[int] = field(default_factory=list)

    def take(self, tally: tuple[int, int], samples: int, bad: list[Fault], class_counts: Sequence[int] = ()) -> None:
        """Add what this process took of a batch."""
        skipped = [[fault.index, Path(fault.shard).name, fault.offset, fault.key, fault.reason] for fault in bad]
        self._add(tally, samples, skipped, class_counts)

    def _add(self, tally: tuple[int, int], samples: int, skipped: list[list], class_counts: Sequence[int]) -> None:
        self.samples += samples
        self.class_counts = list(map(sum, zip_longest(self.class_counts, class_counts, fillvalue=0)))
        self.digest = (self.digest + tally[0]) % MODULUS
        self.ordered = (self.ordered + tally[1]) % MODULUS
        self.skipped += skipped

    def settle(self, gather: Callable[[list], list], main: bool, global_step: int, steps_per_epoch: int) -> None:
        """Hand what all processes have taken over to the main one, after iteration `global_step` of the run."""
        parts = gather([self.packed()])
        self.__init__()
        if main:
            for part in parts:
                tallies = int(part["digest"], 16), int(part["ordered"], 16)
                self._add(tallies, part["samples"], part["skipped"], part.get("class_counts", ()))
            self.skipped.sort(key=lambda one: one[0])
        # At an epoch's end, of the epoch that ends.
        self.epoch, before = divmod(max(global_step - 1, 0), steps_per_epoch)
        self.batches = before + 1 if global_step else 0

    def packed(self) -> dict:
        """As JSON: digests in hexadecimal."""
        packed = asdict(self) | {"digest": f"{self.digest:032x}", "ordered": f"{self.ordered:032x}"}
        return {key: value for key, value in packed.items() if key != "class_counts" or value}

    @classmethod
    def unpacked(cls, packed: dict) -> "Receipt":
        return cls(**packed | {"digest": int(packed["digest"], 16), "ordered": int(packed["ordered"], 16)})
