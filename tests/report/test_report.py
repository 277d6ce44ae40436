"""The report tells what the records say, whatever state the run is in, and the page is whole, offline and inert."""

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from dnal_dist.common.text import amount
from dnal_dist.report import outputs
from dnal_dist.report import records as report_records

FULL = {"exact": {"macs": 2_421_376, "params": 287_146}, "paper": {"macs": 2_430_000, "params": 287_000}}
COMPACT = {"exact": {"macs": 281_344, "params": 28_211}, "paper": {"macs": 290_000, "params": 28_000}}
SITES = {"conv0": 8, "conv1": 16, "conv2": 16}
KEPT = {"conv0": 1, "conv1": 4, "conv2": 0}
HISTOGRAMS = [[40 * (bin == 9) for bin in range(20)], [10 + i for i in range(20)], [35, *[0] * 18, 5]]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$name${title}\x1b[31m[bold]"


def made_up_run() -> list[dict]:
    """A finished run of 20, 30 and 40 iterations, told as docs/run-folder.md says; one second an iteration."""
    records = [
        {
            "kind": "start", "global_step": 0, "name": "digits", "resumed": False, "world_size": 2, "backend": "ddp",
            "device": "CPU", "train_samples": 1442, "val_samples": 355, "steps_per_epoch": 10, "dropped_per_epoch": 2,
            "sites": SITES, "full": FULL, "versions": {"python": "3.11.7"},
        }
    ]  # fmt: skip
    begin = 0
    for phase, steps, accuracy in (("pretrain", 20, 0.97), ("search", 30, 0.95), ("finetune", 40, 0.9944)):
        if phase == "search":
            records.append(gates(0, begin))
        for step in range(10, steps + 1, 10):
            here = {"phase": phase, "step": step, "epoch": step / 10, "global_step": begin + step}
            train = {
                "phase_steps": steps, "loss": 0.5, "cross_entropy": 0.5, "accuracy": 0.9, "learning_rate": 0.05,
                "images_per_second": 900.0, "data_wait_seconds": 0.25, "bad_samples": 0,
            }  # fmt: skip
            if phase == "search":
                train |= {"penalty": 0.1, "delta": 10.0, "open_share": 0.4, "expected_macs": 500_000}
            records.append({"kind": "train"} | here | train)
            if phase == "search" and step < 30:
                records.append(gates(step // 10, begin))
            value = accuracy - (steps - step) / 1000
            found = {"accuracy": value, "top5": 0.999, "cross_entropy": 0.1, "samples": 355}
            records.append({"kind": "eval"} | here | found)
        records[-1] |= {"balanced_accuracy": accuracy, "per_class": [[176, 177], [177, 178]]}
        begin += steps
        records.append({"kind": "phase", "global_step": begin, "phase": phase, "seconds": float(steps)})
        if phase == "search":
            cut = {"kept": KEPT, "threshold": 0.9, "full": FULL, "compact": COMPACT}
            records.append({"kind": "prune", "global_step": begin, "rescued": ["conv0"], "collapsed": False} | cut)
            found = {"accuracy": 0.93, "top5": 0.99, "cross_entropy": 0.2, "samples": 355}
            records.append({"kind": "eval", "global_step": begin, "phase": "prune", "step": 0, "epoch": 0} | found)
    told = {"pretrain": 20.0, "search": 30.0, "finetune": 40.0}
    records.append({"kind": "end", "global_step": 90, "seconds": 90.0, "phase_seconds": told, "images": 5760})
    return [{"time": 1_790_000_000 + record["global_step"]} | record for record in records]


def gates(index: int, begin: int) -> dict:
    here = {"phase": "search", "step": 10 * index, "epoch": float(index), "global_step": begin + 10 * index}
    found = {"delta": [1, 100, 10_000][index], "histogram": HISTOGRAMS[index], "open": {site: 1 for site in SITES}}
    return {"kind": "gates"} | here | found


def save(folder, records, tail: bytes = b"", recipe: str | None = "name: digits\nmodel: {name: vgg_digits}\n"):
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_bytes(lines.encode() + tail)
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return folder


def changed(records: list[dict], kind: str, **values) -> list[dict]:
    return [record | values if record["kind"] == kind else record for record in records]


def page_of(folder) -> str:
    outputs.write_all(folder, draw=False)
    return (folder / "report.html").read_text("utf-8")


def numbers_in(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.S).group(1))


def values_in(page: str, figure: str) -> list[dict[str, list[str]]]:
    """The texts that a figure of the page has for the pointer: {series: texts} of each panel."""
    return [{one["name"]: one["text"] for one in panel["series"]} for panel in numbers_in(page)["figures"].get(figure, [])]


def table_of(folder, width: int = 80) -> str:
    out = io.StringIO()
    outputs.print_table(folder, Console(file=out, width=width))
    return out.getvalue()


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dnal_dist.report", *map(str, arguments)], capture_output=True, text=True)


class Tags(HTMLParser):
    """The tags of a page, in order, and the values of its attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text.append(data)


def test_summary_is_what_the_records_say(tmp_path):
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


@pytest.mark.parametrize("count", range(1, len(made_up_run()) + 1))
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


def test_a_phase_that_goes_on_is_not_told_as_done(tmp_path):
    records = made_up_run()
    ends = next(i for i, r in enumerate(records) if r["kind"] == "phase" and r["phase"] == "search")
    assert "accuracy so far in search   95.00 %" in table_of(save(tmp_path, records[:ends]))
    assert "accuracy after search       95.00 %" in table_of(save(tmp_path, records[: ends + 1]))


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
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, state, words):
    folder = tmp_path / "run"
    if state != "no folder":
        folder.mkdir()
    if state == "empty":
        save(folder, [])
    elif state == "only a torn line":
        save(folder, [], b'{"kind"')
    elif state == "recipe not YAML":
        save(folder, made_up_run(), recipe="name: [")
    done = command(folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {folder}") and words in done.stderr and done.stderr.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_command_writes_the_page_and_prints_the_table(tmp_path):
    done = command(save(tmp_path, made_up_run()))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path / 'report.html'}\n" in done.stdout
    assert 50_000 < (tmp_path / "report.html").stat().st_size < 500_000
    assert "example runs/digits" in command("--help").stdout


def test_table_is_plain_and_uncut_where_there_is_no_terminal(tmp_path):
    folder = tmp_path / ("long" * 30)
    message = "something " * 30 + "at the end"
    save(folder, [*made_up_run(), {"kind": "warning", "message": message}])
    page_of(folder)
    table = table_of(folder)
    for line in (
        "accuracy after pretrain     97.00 %",
        "accuracy after pruning      93.00 %",
        "accuracy after finetune     99.44 %",
        "MACs                        2.42 M -> 0.281 M, 11.6 %, 8.6x fewer",
        "parameters                  287 k -> 28.2 k, 9.8 %, 10.2x fewer",
        "channels kept               5 of 40, 12.5 %",
        "time                        1 min 30 s",
        f"report                      {folder / 'report.html'}",
        f"WARNING: {message}",
    ):
        assert f"{line}\n" in table
    assert "\x1b" not in table


def test_collapse_and_warnings_are_loud(tmp_path):
    warning = {"kind": "warning", "time": 1_790_000_030, "global_step": 30, "message": "the penalty rests"}
    records = [*changed(made_up_run(), "prune", collapsed=True), warning, warning]
    save(tmp_path, records, recipe="architecture: {penalty_weight: 0.25}\n")
    page, table = page_of(tmp_path), table_of(tmp_path)
    assert (
        report_records.summary(tmp_path)["collapsed"] and report_records.summary(tmp_path)["warnings"] == ["the penalty rests"] * 2
    )
    assert 'role="alert"' in page and "The architecture collapsed." in page and "penalty_weight (0.25 in" in page
    assert "the penalty rests (2 times)" in page
    assert "WARNING: the penalty rests (2 times)\n" in table and "\nTHE ARCHITECTURE COLLAPSED: " in table
    quiet = page_of(save(tmp_path, made_up_run()))
    assert 'role="alert"' not in quiet and 'role="note"' not in quiet


def test_page_asks_for_nothing_from_outside(tmp_path):
    page = page_of(save(tmp_path, made_up_run()))
    found = Tags(page)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "a"} & set(found.tags)
    assert not {name for name, _ in found.attributes} & {"src", "href", "srcset", "action", "data", "background"}
    # Within the figures: parts of the same element, and the heat map's cells.
    links = [value for name, value in found.attributes if name == "xlink:href"]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert ("http-equiv", "Content-Security-Policy") in found.attributes
    assert [value for name, value in found.attributes if name == "content" and "default-src 'none';" in value]
    inline = re.sub(r"data:image/png;base64,[^\"]*", "", page)
    assert not re.search(r"https?:|//[a-z]+\.|url\((?!#)|@import", inline)


def hostile_run() -> list[dict]:
    records = changed(made_up_run(), "start", name=HOSTILE, device=HOSTILE, versions={HOSTILE: HOSTILE})
    records = changed(records, "start", sites={HOSTILE: 8, "conv1": 16, "conv2": 16})
    records = changed(records, "prune", kept={HOSTILE: 1, "conv1": 4, "conv2": 0}, rescued=[HOSTILE])
    return [*records, {"kind": "warning", "time": 1_790_000_090, "global_step": 90, "message": HOSTILE}]


FIGURE = r'<figure class="plot".*?</figure>'


def test_hostile_names_are_inert(tmp_path):
    warning = {"kind": "warning", "time": 1_790_000_090, "global_step": 90, "message": "look"}
    tame_page = page_of(save(tmp_path / "tame", [*made_up_run(), warning]))
    recipe = f"name: {json.dumps(HOSTILE)}\nmodel: {{name: {json.dumps(HOSTILE)}}}\n"
    page = page_of(save(tmp_path / "hostile", hostile_run(), recipe=recipe))
    tame, found = (Tags(re.sub(FIGURE, "", one, flags=re.S)) for one in (tame_page, page))
    # The same elements as those of the same run with tame names; "." in a name is a place to break.
    assert [tag for tag in found.tags if tag != "wbr"] == [tag for tag in tame.tags if tag != "wbr"]
    assert found.tags.count("script") == 2
    assert [name for name, _ in found.attributes] == [name for name, _ in tame.attributes]
    assert found.text.count(HOSTILE.replace("\x1b", " ")) >= 3
    # In the figures there are other letters and no other element.
    tame, drawn = (Tags("".join(re.findall(FIGURE, one, re.S))) for one in (tame_page, page))
    assert set(drawn.tags) <= set(tame.tags) and {name for name, _ in drawn.attributes} <= {name for name, _ in tame.attributes}
    assert "\x1b" not in table_of(tmp_path / "hostile") and "[bold]" in table_of(tmp_path / "hostile")


def test_numbers_reach_the_page(tmp_path):
    page = page_of(save(tmp_path, made_up_run()))
    gates, opened, macs = values_in(page, "search")
    counts = [int(text.rpartition(": ")[2]) for text in gates["gates"]]
    assert counts == [count for histogram in HISTOGRAMS for count in histogram if count]
    assert gates["gates"][0] == "epoch 0, delta 1, gates near 0.475: 40"
    assert gates["gates"][-1] == "epoch 2, delta 10,000, gates near 0.975: 5"
    assert opened == {"open gates": [f"epoch {epoch}: 40.0 %" for epoch in (1, 2, 3)]}
    assert macs["expected"] == [f"epoch {epoch}: 500 k" for epoch in (1, 2, 3)]
    assert macs["compact network, 0.281 M"] == ["epoch 3: 281 k"] and "threshold 0.9" in page and "full network, 2.42 M" in page
    accuracy, loss = values_in(page, "curves")
    assert accuracy["training batches"] == [f"iteration {10 * i}: 90.00 %" for i in range(1, 10)]
    assert accuracy["after pruning"] == ["iteration 50: 93.00 %"] and accuracy["held-out images"][-1] == "iteration 90: 99.44 %"
    assert loss["training loss with the penalty"] == [f"iteration {step}: 0.5000" for step in (30, 40, 50)]
    assert "pretrain 1 to 20, search 21 to 50, finetune 51 to 90" in page


def test_values_stand_where_they_are_drawn(tmp_path):
    page = page_of(save(tmp_path, made_up_run()))
    for figure in numbers_in(page)["figures"].values():
        for panel in figure:
            left, top, right, bottom = panel["box"]
            assert 0 <= left < right <= 72 * 6.4 and 0 <= top < bottom
            for series in panel["series"]:
                assert len(series["x"]) == len(series["y"]) == len(series["text"]) > 0
                assert all(left - 1 <= x <= right + 1 for x in series["x"]) and all(top - 1 <= y <= bottom + 1 for y in series["y"])
    accuracy = numbers_in(page)["figures"]["curves"][0]
    (held_out,) = [series for series in accuracy["series"] if series["name"] == "held-out images"]
    left, _, right, _ = accuracy["box"]
    # Iteration 90 of 90 is at the right edge, iteration 10 a ninth of the width from the left; higher is better.
    assert (held_out["x"][-1], held_out["x"][0]) == pytest.approx((right, left + (right - left) / 9), abs=0.2)
    assert held_out["y"][-1] == min(held_out["y"])


def test_channels_of_every_layer_are_told(tmp_path):
    text = " ".join(Tags(page_of(save(tmp_path, made_up_run()))).text)
    assert re.search(r"conv0\s+1 of 8\s+rescued", text)
    assert re.search(r"conv1\s+4 of 16\s+25\s%", text)
    assert re.search(r"conv2\s+0 of 16\s+closed", text)
    many = {f"blocks.{i}.expand": 48 for i in range(255)}
    records = changed(made_up_run(), "start", sites=many)
    page = page_of(save(tmp_path, changed(records, "prune", kept=dict.fromkeys(many, 12), rescued=[])))
    assert page.count(">12 of 48</td>") == 255 and "3,060 of 12,240 channels in 255 layers" in page


def test_a_loss_that_is_not_a_number_leaves_a_gap(tmp_path):
    records = made_up_run()
    last = max(i for i, r in enumerate(records) if r["kind"] == "train")
    records[last] |= {"loss": math.nan, "cross_entropy": math.inf}
    accuracy, loss = values_in(page_of(save(tmp_path, records)), "curves")
    assert loss["training batches"] == [f"iteration {10 * i}: 0.5000" for i in range(1, 9)]
    assert accuracy["training batches"][-1].startswith("iteration 90")


def test_a_long_run_is_thinned_without_losing_its_mean(tmp_path):
    step = next(r for r in made_up_run() if r["kind"] == "train")
    records = [made_up_run()[0], *(step | {"step": i, "global_step": i, "accuracy": i / 6300} for i in range(1, 6301))]
    texts = values_in(page_of(save(tmp_path, records)), "curves")[0]["training batches"]
    assert 300 < len(texts) <= 700
    assert sum(float(text.split()[2]) for text in texts) / len(texts) == pytest.approx(100 * 6301 / 12600, abs=0.01)
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    before = page_of(save(tmp_path, made_up_run()))

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("dnal_dist.common.atomic.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        page_of(save(tmp_path, made_up_run()[:5]))
    assert (tmp_path / "report.html").read_text("utf-8") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "recipe.yaml", "report.html", "report.md"]


def test_recipe_is_shown_and_may_be_absent(tmp_path):
    assert "model: {name: vgg_digits}" in page_of(save(tmp_path / "a", made_up_run()))
    assert "recipe.yaml is not in the run folder" in page_of(save(tmp_path / "b", made_up_run(), recipe=None))


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
