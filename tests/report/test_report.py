"""The report tells what the records say, whatever state the run is in, and the page is whole, offline and inert."""

import subprocess
import sys

import pytest
from in_process import called
from made_up import COMPACT, FULL, made_up_run, numbers_in, page_of, save, table_of

from dnal_dist.common.text import amount
from dnal_dist.report import records as report_records
from dnal_dist.report.__main__ import main


def first_of_each() -> list[int]:
    """Numbers of records at which a run first has one of a kind in a phase."""
    seen = [(record["kind"], record.get("phase")) for record in made_up_run()]
    return [seen.index(one) + 1 for one in dict.fromkeys(seen)]


def test_the_summary_follows_from_the_records(tmp_path):
    result = report_records.summary(save(tmp_path, made_up_run()))
    assert result["accuracy"] == {"pretrain": 0.97, "search": 0.95, "prune": 0.93, "finetune": 0.9944}
    assert (result["full"], result["compact"]) == (FULL, COMPACT)
    assert result["macs_ratio"] == 281_344 / 2_421_376
    assert result["params_ratio"] == 28_211 / 287_146
    assert result["channels"] == {"kept": 5, "total": 40}
    assert (result["collapsed"], result["warnings"], result["finished"]) == (False, [], True)
    assert (result["seconds"], result["phase"]) == (90.0, "finetune")
    assert {phase: result["phase_seconds"][phase] for phase in ("pretrain", "search", "finetune")} == {
        "pretrain": 20.0,
        "search": 30.0,
        "finetune": 40.0,
    }


@pytest.mark.parametrize("count", first_of_each())
def test_a_run_may_end_after_any_record(tmp_path, count):
    records = made_up_run()[:count]
    result = report_records.summary(save(tmp_path, records))
    assert result["finished"] == (count == len(made_up_run()))
    assert list(result["accuracy"]) == list(dict.fromkeys(r["phase"] for r in records if r["kind"] == "eval"))
    pruned = any(r["kind"] == "prune" for r in records)
    assert ("compact" in result, "macs_ratio" in result, "kept" in result["channels"]) == (pruned,) * 3
    page, table = page_of(tmp_path), table_of(tmp_path)
    assert ("Not finished" in page, "Not finished" in table) == (not result["finished"],) * 2
    phases = {r["phase"] for r in records if r["kind"] == "train"}
    assert all(
        f"{phase} {first} to " in page for phase, first in (("pretrain", 1), ("search", 21), ("finetune", 51)) if phase in phases
    )
    assert ("curves" in numbers_in(page)["figures"]) == bool(phases)


def test_a_running_phase_is_not_shown_as_done(tmp_path):
    records = made_up_run()
    ends = next(i for i, r in enumerate(records) if r["kind"] == "phase" and r["phase"] == "search")
    assert "accuracy so far in search   95.00 %" in table_of(save(tmp_path, records[:ends]))
    assert "accuracy after search     95.00 %" in table_of(save(tmp_path, records[: ends + 1]))


@pytest.mark.parametrize("tail", [b'{"kind": "tr', b'{"name": "\xc3', b"\0\0\0\n", b"\n\n"], ids=["json", "utf8", "nul", "blank"])
def test_a_torn_last_line_is_left_out(tmp_path, tail):
    whole = report_records.summary(save(tmp_path, made_up_run()))
    assert report_records.summary(save(tmp_path, made_up_run(), tail)) == whole


def test_unknown_kinds_and_keys_change_nothing(tmp_path):
    whole = report_records.summary(save(tmp_path, made_up_run()))
    strange = [record | {"news": [1]} for record in made_up_run()]
    strange.insert(3, {"kind": "mystery", "time": strange[3]["time"], "global_step": 10})
    assert report_records.summary(save(tmp_path, strange)) == whole
    assert "mystery" not in page_of(tmp_path)


def test_time_between_a_stop_and_its_resume_does_not_count(tmp_path):
    records = made_up_run()[:4]
    ran = report_records.summary(save(tmp_path, records))["seconds"]
    later = [records[0] | {"resumed": True}, *made_up_run()[4:6]]
    records += [record | {"time": record["time"] + 86_400} for record in later]
    assert ran <= report_records.summary(save(tmp_path, records))["seconds"] < 60


def test_time_before_a_record_without_a_phase_is_of_the_phase_at_hand(tmp_path):
    records = made_up_run()[:7]
    receipts = [
        {"kind": "receipt", "time": r["time"] - 1, "global_step": r["global_step"]} for r in records[2:] if r["kind"] == "train"
    ]
    whole = sorted([*records, *receipts], key=lambda record: record["time"])
    result = report_records.summary(save(tmp_path, whole))
    assert result["seconds"] == sum(result["phase_seconds"].values()) == records[-1]["time"] - records[0]["time"]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("no folder", "no such run folder"),
        ("no metrics", "metrics.jsonl: no such file"),
        ("empty", "metrics.jsonl: holds no record yet"),
        ("only a torn line", "metrics.jsonl: holds no record yet"),
        ("recipe not YAML", "recipe.yaml: not valid YAML"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capfd, state, words):
    folder = tmp_path / "run"
    if state != "no folder":
        folder.mkdir()
    if state == "empty":
        save(folder, [])
    elif state == "only a torn line":
        save(folder, [], b'{"kind"')
    elif state == "recipe not YAML":
        save(folder, made_up_run(), recipe="name: [")
    code, out, error = called(main, capfd, folder)
    assert (code, out) == (2, "")
    assert error.startswith(f"error: {folder}") and words in error and error.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_command_writes_the_page_and_prints_the_table(tmp_path):
    command = [sys.executable, "-m", "dnal_dist.report", str(save(tmp_path, made_up_run()))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path / 'report.html'}\n" in done.stdout
    assert 50_000 < (tmp_path / "report.html").stat().st_size < 500_000


def test_table_is_plain_and_uncut_where_there_is_no_terminal(tmp_path):
    folder = tmp_path / ("long" * 30)
    message = "something " * 30 + "at the end"
    save(folder, [*made_up_run(), {"kind": "warning", "message": message}])
    page_of(folder)
    table = table_of(folder)
    for line in (
        "accuracy after pretrain   97.00 %",
        "accuracy after pruning    93.00 %",
        "accuracy after finetune   99.44 %",
        "MACs                      2.42 M -> 0.281 M, 11.6 %, 8.6x fewer",
        "parameters                287 k -> 28.2 k, 9.8 %, 10.2x fewer",
        "channels kept             5 of 40, 12.5 %",
        "time                      1 min 30 s",
        f"report                    {folder / 'report.html'}",
        f"WARNING: {message}",
    ):
        assert f"{line}\n" in table
    assert "\x1b" not in table


@pytest.mark.parametrize(
    ("count", "like", "text"),
    [
        (0, None, "0"),
        (28, None, "28"),
        (999.6, None, "1 k"),
        (999_600, None, "1 M"),
        (2_421_376, None, "2.42 M"),
        (281_344, 2_421_376, "0.281 M"),
        (3_344, 2_421_376, "3.34 k"),
        (5_943_217_664, None, "5.94 G"),
    ],
)
def test_amounts_have_three_digits_and_a_unit(count, like, text):
    assert amount(count, like) == text


def test_importing_the_report_imports_no_torch():
    code = "import sys, dnal_dist.report; print(sorted({'torch', 'accelerate', 'pydantic', 'wandb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
