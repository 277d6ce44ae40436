"""The latency that a run records at its end."""

from runs import SHORT, arguments, records

from dnal_dist.report import records as reported
from dnal_dist.report import words
from dnal_dist.training import speed


def test_a_run_s_end_has_the_latency_of_both_networks(digits, train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "SHARE", 1.0)
    monkeypatch.setattr(speed, "LEAST_SECONDS", 0.0)
    ended = train_here(*arguments(digits, tmp_path / "run", *SHORT, "tracking.latency_seconds=0.01"))
    assert ended.code == 0 and "latency at batch 1" in ended.out
    kinds = [record["kind"] for record in records(tmp_path / "run")]
    assert kinds.index("latency") < kinds.index("end") and kinds.count("latency") == 1
    (row,) = reported.summary(tmp_path / "run")["latency"]["rows"]
    assert row["median"].keys() == {"full", "compact"} and row["faster"]["compact"] > 0


def test_short_runs_do_without(finished):
    assert not records(finished, "latency") and "latency" not in reported.summary(finished)


def test_latency_is_put_in_words():
    def said(full: float, compact: float) -> str:
        row = {"batch": 1, "median": {"full": full, "compact": compact}, "faster": {"compact": full / compact}}
        return words.latency(row, "a phone")

    assert said(0.0029, 0.001) == "2.9 ms -> 1 ms, 2.9x faster on a phone"
    assert said(0.001, 0.002).endswith("2.0x slower on a phone") and said(2.0, 2.0) == "2 s -> 2 s, no faster on a phone"
