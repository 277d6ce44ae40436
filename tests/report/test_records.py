"""Run folders that are damaged or hostile: what is wrong is left out and counted, and nothing raises, hangs or escapes."""

import copy
import io
import json
import os
import random

import pytest
from made_up import made_up_run, save, table_of
from rich.console import Console

from dnal_dist import runs
from dnal_dist.report import comparison, comparison_files, outputs, page, records, run_list, tables

WRONG = (
    *(None, True, "", "x", "\x1b[31m\nred", -1, 0, 1, 0.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"), 10**18, 10**400),
    *([], {}, [[1]], [1, 2], ["a", "b"], {"a": 1}, {"exact": {"macs": 0, "params": 0}}, {"exact": {"macs": 1}}, "search", "done"),
    json.loads("[" * 300 + "]" * 300),
)


def keys(record: dict, above: tuple = ()):
    for key, value in record.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from keys(value, (*above, key))


def cases() -> list[tuple[str, tuple, object]]:
    """Every key of every kind of record, with every wrong value."""
    last = {record["kind"]: record for record in whole()}
    found = [(kind, path, wrong) for kind, record in last.items() for path in keys(record) for wrong in WRONG]
    random.Random(0).shuffle(found)
    return found


def whole() -> list[dict]:
    by_site = {site: [1] * 10 for site in ("conv0", "conv1", "conv2")}
    lines = [record | {"by_site": by_site} if record["kind"] == "gates" else record for record in made_up_run()]
    layers = {"conv0.conv": {which: {"macs": 2, "params": 1} for which in ("full", "compact")}}
    budget = {"unit": "macs", "least": 1, "most": 2, "full": 3}
    lines = [record | {"layers": layers, "budget": budget} if record["kind"] == "prune" else record for record in lines]
    head = {"time": 1_790_000_089, "global_step": 89}
    receipt = {"kind": "receipt", "epoch": 0, "batches": 3, "samples": 9, "digest": "a", "skipped": [[1, "s", 2, "k", "why"]]}
    saved = {"kind": "checkpoint", "phase": "done", "step": 0, "name": "step", "pause_seconds": 0.1}
    stopped = {"kind": "stop", "phase": "search", "step": 1, "reason": "asked"}
    return [*lines[:-1], receipt | head, saved | head, stopped | head, {"kind": "warning", "message": "look"} | head, lines[-1]]


def spoilt(kind: str, path: tuple, wrong: object) -> list[dict]:
    found = copy.deepcopy(whole())
    for record in found:
        inner = record if record["kind"] == kind else {}
        for key in path[:-1]:
            inner = inner.get(key, {})
        if path[-1] in inner:
            inner[path[-1]] = wrong
    return found


@pytest.mark.parametrize("part", range(4))
def test_no_wrong_value_of_any_key_breaks_a_list_a_report_or_a_comparison(tmp_path, part):
    for kind, path, wrong in cases()[part:400:4]:
        run = save(tmp_path / "run", spoilt(kind, path, wrong))
        out = io.StringIO()
        found = run_list.listed(tmp_path)
        out.write(str([runs.cells(one, tmp_path) for one in found]) + json.dumps(found, allow_nan=False))
        read = records.load(run)
        result = records.result_of(read)
        out.write(page.html(read, result, {}) + page.markdown(read, result, []))
        outputs.print_table(run, Console(file=out, width=80))
        compared = comparison.compare([run])
        comparison_files.show(compared, tmp_path, lambda *parts, out=out: out.write(str(parts)))
        out.write(comparison_files.as_csv(compared))
        assert "\x1b" not in out.getvalue(), (kind, path, wrong)


def test_figures_are_drawn_of_wrong_values(tmp_path):
    drawn = ("histogram", "epoch", "global_step", "per_class", "open", "kept", "expected_macs")
    chosen = [case for case in cases() if case[1][-1] in drawn and case[2] not in (None, "", {}, [])]
    for kind, path, wrong in chosen[:3]:
        run = save(tmp_path, spoilt(kind, path, wrong))
        outputs.write_all(run, draw=False)


def test_what_is_left_out_is_counted_and_named(tmp_path):
    lines = made_up_run()
    lines[2]["accuracy"], lines[2]["loss"], lines[3]["phase"] = "x", 1e300, "elsewhere"
    run = save(tmp_path / "run", lines)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:5], "nonsense", "[1]", "[" * 9_000, *lines[5:], '{"kind": "tr']))
    faults = "3 damaged lines and 3 wrong values of metrics.jsonl were left out, the first in line 3, key loss"
    assert records.load(run).faults == faults
    assert faults in table_of(run)
    (one,) = run_list.listed(tmp_path)
    assert (one["state"], one["warnings"]) == ("finished", 1)
    assert any(faults in line for line in comparison_files.remarks(comparison.compare([run])))
    (run / "metrics.jsonl").write_text("3\n[]\n{}\n")
    with pytest.raises(ValueError, match="none of its 3 lines is a record"):
        records.load(run)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "recipe",
    [f"{BOMB}name: *i\n", "seed: 2020-99-99", "seed: 0x_", f"seed: {'9' * 5000}", "seed: !!int abc", "seed: !!map abc", "[" * 5000],
    ids=["aliases", "date", "hexadecimal", "digits", "int", "map", "deep"],
)
def test_an_invalid_recipe_is_one_line(tmp_path, recipe):
    run = save(tmp_path, made_up_run(), recipe=recipe)
    with pytest.raises(ValueError, match=r"recipe\.yaml: not valid YAML.*; mend it") as refused:
        records.load(run)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.yaml"])
def test_a_fifo_or_a_folder_is_no_file(tmp_path, name, make):
    run = save(tmp_path / "run", made_up_run())
    (run / name).unlink()
    make(run / name)
    (one,) = run_list.listed(tmp_path)
    assert one["state"] == "broken" and f"{name}: not a regular file" in one["why"]


def test_nothing_is_written_through_a_link(tmp_path):
    run, elsewhere = save(tmp_path / "run", made_up_run()), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / "plots").symlink_to(elsewhere)
    (run / "report.html").symlink_to(elsewhere / "page")
    with pytest.raises(ValueError, match="plots: a link to elsewhere"):
        outputs.write_all(run)
    assert not list(elsewhere.iterdir()) and (run / "report.html").is_file() and (run / "report.md").is_file()


def test_imbalance_behind_top_1_accuracy_is_reported(tmp_path):
    lines = made_up_run()
    for record in lines:
        if "per_class" in record:
            record |= {"accuracy": 0.9775, "balanced_accuracy": 0.5, "per_class": [[347, 347], [0, 8]]}
    run = records.load(save(tmp_path, lines))
    words = "top-1 accuracy 97.75 % is 50.00 % as a mean over classes: the weakest, class 1, has 0.00 % of 8 images"
    assert words in table_of(tmp_path)
    counted = [*lines, {"kind": "receipt", "global_step": 90, "time": lines[-1]["time"], "epoch": 0, "class_counts": [1400, 42]}]
    own = records.load(save(tmp_path / "counted", counted))
    assert tables.classes(own).head[-1] == "training images" and tables.classes(own).rows[0] == ["1", "0.00 %", "0 of 8", "42"]
    assert f"{words}, and 42 of 1,442 training images" in table_of(tmp_path / "counted")
    assert tables.classes(run).rows == [["1", "0.00 %", "0 of 8"], ["0", "100.00 %", "347 of 347"]]
    table = tables.accuracy(run, records.result_of(run))
    assert table.rows[-1][table.head.index("mean over classes")] == "50.00 %"
    outputs.write_all(run, draw=False)
    assert 'id="classes"' in (tmp_path / "report.html").read_text()
