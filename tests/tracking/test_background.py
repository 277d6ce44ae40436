"""A tracker that hangs, fails or refuses stops neither the run nor the records after."""

import threading
from types import SimpleNamespace

from runs import records

from dnal_dist.recipe import load
from dnal_dist.tracking import background
from dnal_dist.tracking.background import Sender
from dnal_dist.tracking.run_log import RunLog


def test_a_refused_item_does_not_stop_the_others():
    taken = []

    def take(item):
        if item == "bad":
            raise ValueError("not\nthis")
        taken.append(item)

    tracker = SimpleNamespace(
        start=lambda behind: None,
        send=lambda kind, values, step, age: take(kind),
        finish=lambda step: [lambda item=item: take(item) for item in ("summary", "bad", "report")],
        stop=lambda: taken.append("stopped"),
    )
    thread = Sender(tracker, 0)
    for kind in ("first", "bad", "second"):
        thread.send(kind, {}, 0, 0)
    thread.close(60, 3)
    assert taken == ["first", "second", "summary", "report", "stopped"]
    assert thread.faults == [
        "refused an item, and is sent the others (not this)",
        "refused 2 items in all; the run folder has them",
    ]


def test_nothing_is_recorded_after_the_end(tmp_path):
    """Readers of metrics.jsonl rely on its last line."""
    log = RunLog(tmp_path, load("recipes/digits.yaml", ["tracking.tracker=none"]), SimpleNamespace(main=True))
    log.record("end", seconds=1.0)
    log.warn("W&B stopped taking records")
    assert [record["kind"] for record in records(tmp_path)] == ["end"]


class Stuck:
    """A tracker that hangs in its first record."""

    def __init__(self):
        self.taken, self.let_go, self.entered = [], threading.Event(), threading.Event()

    def start(self, behind: int) -> None:
        pass

    def send(self, *record) -> None:
        self.taken.append(record)
        self.entered.set()
        self.let_go.wait()

    def finish(self, step: int) -> None:
        self.taken.append(step)

    def stop(self) -> None:
        self.taken.append("stopped")

    def give_up(self) -> None:
        self.let_go.set()


def test_a_hanging_tracker_is_abandoned(monkeypatch):
    monkeypatch.setattr(background, "WAITING", 5)
    tracker = Stuck()
    thread = Sender(tracker, 0)
    thread.send("train", {}, 0, 0)
    tracker.entered.wait()
    for step in range(1, 20):
        thread.send("train", {}, step, step)
    assert thread.faults == ["takes records more slowly than they come; some are left out there"] and thread.dropped == 14
    thread.close(0.1, 20)
    assert thread.faults[1].startswith("did not take the last records in 0.1 s")
    assert thread.faults[2].startswith("was too slow for 14 records")
    assert tracker.taken == [("train", {}, 0, 0), "stopped"]


def test_waiting_records_are_sent_before_the_end():
    tracker = Stuck()
    tracker.let_go.set()
    thread = Sender(tracker, 0)
    for step in range(3):
        thread.send("train", {}, step, step)
    thread.close(60, 3)
    assert tracker.taken == [("train", {}, step, step) for step in range(3)] + [3, "stopped"] and not thread.faults


def test_a_tracker_that_does_not_start_gets_no_records():
    tracker = Stuck()

    def refuse(behind):
        raise OSError("no\nroom")

    tracker.start = refuse
    thread = Sender(tracker, 0)
    assert thread.faults == ["did not start; the run goes on without it (no room)"]
    thread.send("train", {}, 0, 0)
    thread.close(60, 1)
    assert tracker.taken == ["stopped"] and len(thread.faults) == 1
