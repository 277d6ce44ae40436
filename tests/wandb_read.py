"""What an offline W&B run holds: protobuf records in a LevelDB log of 32 KiB blocks."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Offline:
    """The parts of a run, one after the other."""

    ids: list[str] = field(default_factory=list)
    names_shown: list[str] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    """The step metric of each name or pattern."""
    artifacts: dict = field(default_factory=dict)
    tables: dict = field(default_factory=dict)

    def series(self, name: str) -> list:
        return [row[name] for row in self.history if name in row]

    @property
    def names(self) -> set[str]:
        return {name for row in self.history for name in row} | self.summary.keys()


def offline(run: Path) -> Offline:
    """All parts in the run folder `run`."""
    found = Offline()
    for part in sorted((run / "wandb").glob("offline-run-*")):
        (path,) = part.glob("run-*.wandb")
        for record in _records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found.ids.append(record.run.run_id)
                found.names_shown.append(record.run.display_name)
                found.config |= _items(record.run.config.update)
            elif kind == "config":
                found.config |= _items(record.config.update)
            elif kind == "history":
                found.history.append(_items(record.history.item))
            elif kind == "summary":
                found.summary |= _items(record.summary.update)
            elif kind == "metric":
                found.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            elif kind == "artifact":
                found.artifacts[record.artifact.name] = record.artifact
        found.tables |= {path.parent.name: json.loads(path.read_text()) for path in part.rglob("*.table.json")}
    return found


def _items(items) -> dict:
    found: dict = {}
    for item in items:
        *parents, last = item.nested_key or [item.key]
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = json.loads(item.value_json)
    return found


def _records(path: Path) -> Iterator:
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):
            return  # cut off
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""
