"""The page is whole, offline and inert, and its numbers are those of the records."""

import json
import math
import re

import pytest
from made_up import FIGURE, HISTOGRAMS, HOSTILE, Tags, changed, made_up_run, numbers_in, page_of, save, table_of, values_in

from dnal_dist.report import records as report_records


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


def test_channels_of_every_layer_are_listed(tmp_path):
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
