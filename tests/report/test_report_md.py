"""report.md and the plots tell what the records say, as GitHub renders it, and take nothing from a run for markup."""

import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree

import pytest
import yaml
from made_up import HOSTILE, SITES, Tags, changed, made_up_run, save
from markdown_it import MarkdownIt
from PIL import Image
from runs import SHORT, arguments

from dnal_dist.common.text import printable
from dnal_dist.report import figures, outputs, page, style
from dnal_dist.report import records as report_records
from dnal_dist.report.records import result_of

PLOTS = tuple(figures.TITLES)
MARKUP = "# _a_ *b* `c` [d](http://x.test) | e <b>f</b> &amp; @someone #12 $x^2$ ~~g~~ \\ 1. - \n---\n> h"


def markdown_of(folder) -> str:
    run = report_records.load(folder)
    return page.markdown(run, result_of(run), list(figures.TITLES))


def rendered(folder) -> Tags:
    render = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render
    # What keeps names from being mentions is no text.
    return Tags(render(markdown_of(folder).replace("<!-- -->", "")))


def words(tags: Tags) -> str:
    return " ".join(" ".join(tags.text).split())


def ledgers(records: list[dict]) -> list[dict]:
    used = {"images": 1280, "device_seconds": 7200.0, "bytes_sent": 4_000_000, "energy_kwh": 0.25}
    return [record | used if record["kind"] == "phase" else record for record in records]


def test_the_report_follows_from_the_records(tmp_path):
    tags = rendered(save(tmp_path, made_up_run()))
    text = words(tags)
    for part in (
        "99.44 % top-1 accuracy with 11.6 % of the full network's MACs and 9.8 % of its parameters.",
        "accuracy after pruning 93.00 %",
        "2.42 M -> 0.281 M, 11.6 %, 8.6x fewer",
        "after finetune compact 99.44 % 99.90 % 99.44 % 0.1000 355",
        "5 of 40 channels in 3 layers kept",
        "conv1 16 4 25.0 %",
        "conv0 8 1 12.5 % rescued",
        "conv2 16 0 0.0 % closed",
        "processes 2",
        "python 3.11.7",
        "whole run 1 min 30 s",
    ):
        assert part in text, part
    assert tags.tags.count("h1") == 1 and tags.tags.count("details") == 3
    assert [value for name, value in tags.attributes if name == "src"] == [f"plots/{name}.png" for name in figures.TITLES]


def test_the_usage_table_has_the_columns_that_are_recorded(tmp_path):
    text = words(rendered(save(tmp_path / "without", made_up_run())))
    assert "device time" not in text and "energy" not in text and "search 30.0 s" in text
    text = words(rendered(save(tmp_path / "with", ledgers(made_up_run()))))
    assert "phase time device time training images sent by each process energy iterations" in text
    assert (
        "search 30.0 s 2 h 00 min 1,280 4 MB 0.25 kWh 30 of 30" in text
        and "whole run 1 min 30 s 6 h 00 min 3,840 12 MB 0.75 kWh" in text
    )


def test_the_last_checkpoint_is_no_phase(tmp_path):
    *records, end = ledgers(made_up_run())
    last = {"kind": "checkpoint", "phase": "done", "step": 0, "global_step": 90, "time": end["time"] + 5}
    end["time"] += 6
    text = words(rendered(save(tmp_path, [*records, last, end])))
    assert "done" not in text and "whole run 1 min 30 s 6 h 00 min" in text


@pytest.mark.parametrize("hostile", [HOSTILE, MARKUP, "`" * 5 + "\n```\n<b>x</b>"])
def test_hostile_names_stay_words_in_markdown(tmp_path, hostile):
    plain = rendered(save(tmp_path / "plain", made_up_run(), recipe=yaml.safe_dump({"name": "x", "model": {"name": "y"}})))
    records = changed(made_up_run(), "start", name=hostile, sites={hostile: 8, "b": 2}, device=hostile, versions={hostile: hostile})
    records = changed(records, "prune", kept={hostile: 1, "b": 0}, rescued=[hostile])
    records.insert(5, {"kind": "warning", "time": 1_790_000_001, "global_step": 1, "message": hostile})
    recipe = yaml.safe_dump({"name": hostile, "model": {"name": hostile}, "output": hostile})
    evil = rendered(save(tmp_path / "evil", records, recipe=recipe))
    allowed = set(plain.tags) | {"blockquote"}
    assert set(evil.tags) <= allowed and evil.tags.count("h1") == 1 and evil.tags.count("a") == plain.tags.count("a")
    assert evil.tags.count("td") == plain.tags.count("td") - 5, "one site fewer, and no cell more"
    shown = " ".join(printable(hostile).split())
    # The device, both cells of the version, the site, the warning, the title, and the network.
    assert words(evil).count(shown) >= 7
    assert "@someone" not in markdown_of(tmp_path / "evil").split("```")[0]


def test_every_plot_is_there_in_both_forms_and_nothing_else(tmp_path):
    outputs.write_all(save(tmp_path, made_up_run()))
    assert (tmp_path / "report.md").read_text() == markdown_of(tmp_path)
    links = [value for name, value in rendered(tmp_path).attributes if name in ("src", "href")]
    assert len(links) == 2 * len(PLOTS) and all((tmp_path / link).exists() for link in links)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(f"{n}.{s}" for n in PLOTS for s in ("png", "svg"))
    for name in PLOTS:
        root = ElementTree.parse(tmp_path / "plots" / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
        with Image.open(tmp_path / "plots" / f"{name}.png") as image:
            assert image.width == round(style.WIDTH * 200) and image.height > 300
            assert len(set(image.convert("L").resize((60, 60)).get_flattened_data())) > 5


def test_what_cannot_be_finished_leaves_what_was_there_and_equal_runs_have_equal_plots(tmp_path, monkeypatch):
    outputs.write_all(save(tmp_path, made_up_run()))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("dnal_dist.common.atomic.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        outputs.write_all(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    outputs.write_all(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def drawn(run, name):
    """A figure's axes: the values of its lines by label, and its words."""
    with style.drawing():
        figure = figures.draw(run, result_of(run))[name].figure
        return {line.get_label(): list(line.get_ydata()) for axes in figure.axes for line in axes.get_lines()}, figure


def test_plots_draw_the_records(tmp_path):
    records = made_up_run()
    run = report_records.load(save(tmp_path, records))
    lines, _ = drawn(run, "curves")
    held_out = [r["cross_entropy"] for r in records if r["kind"] == "eval" and r["phase"] != "prune"]
    assert lines["held-out images"] == pytest.approx(held_out) and lines["after pruning"] == [0.2]
    lines, figure = drawn(run, "search")
    assert lines["expected"] == [500_000] * 3 and lines["compact network, 0.281 M"] == [281_344]
    mesh = figure.axes[0].collections[0].get_array()
    assert mesh.filled(0).sum() == sum(sum(r["histogram"]) for r in records if r["kind"] == "gates")
    _, figure = drawn(run, "channels")
    bars = [[bar.get_height() for bar in group] for group in figure.axes[0].containers]
    assert bars == [list(SITES.values()), [1, 4, 0]]
    _, figure = drawn(run, "cost")
    points = [tuple(point) for group in figure.axes[0].collections for point in group.get_offsets()]
    assert sorted(points) == [(281_344, 93.0), (281_344, 99.44), (2_421_376, 97.0)]


@pytest.mark.parametrize("count", (1, 8, len(made_up_run())))
def test_a_run_may_end_after_any_record(tmp_path, count):
    records = [{key: value for key, value in r.items() if key != "versions"} for r in made_up_run()[:count]]
    outputs.write_all(save(tmp_path, records, recipe=None))
    text = words(rendered(tmp_path))
    assert "recipe.yaml is not in the run folder" in text
    assert "Not finished" in text or count == len(made_up_run())


def test_a_plot_without_records_goes(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "search.svg").write_text("old")
    outputs.write_all(save(tmp_path, made_up_run()[:2]))
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["curves.png", "curves.svg"]
    assert "search.png" not in (tmp_path / "report.md").read_text()


def test_a_run_on_more_processes_names_its_launcher(tmp_path):
    (start, *rest) = made_up_run()
    recipe = "name: digits\noutput: my runs/digits\n"
    text = markdown_of(save(tmp_path, [start | {"code": "0123abc+"}, *rest], recipe=recipe))
    command = "accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 -m dnal_dist.train "
    assert f"{command}'my runs/digits/recipe.yaml' output='my runs/digits-again'\n" in text
    assert "git checkout 0123abc   # and the uncommitted changes" in text
    alone = [start | {"world_size": 1, "backend": "single", "code": "$(reboot)"}, *rest]
    text = markdown_of(save(tmp_path, alone, recipe=recipe))
    assert "\npython -m dnal_dist.train 'my runs/digits/recipe.yaml'" in text and "reboot" not in text.partition("```sh")[2]


def test_a_name_is_no_formula_and_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = report_records.load(save(tmp_path, changed(made_up_run(), "start", name="$\\frac{1}{$ \u6f22\U0001f600\ud800")))
        with style.drawing():
            style.save(figures.cost(run, result_of(run)), tmp_path / "cost")
        outputs.write_all(run)


def test_matplotlib_waits_for_the_first_figure():
    code = "import sys, dnal_dist.report; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_report_that_fails_does_not_fail_the_run(train_here, digits, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such font")

    monkeypatch.setattr(figures, "curves", fail)
    ended = train_here(*arguments(digits, tmp_path / "run", *SHORT), report=True)
    assert ended.code == 0, ended.err
    assert "no such font" in ended.out + ended.err and "python -m dnal_dist.report" in ended.out + ended.err
    assert (tmp_path / "run" / "compact" / "weights.safetensors").exists()
