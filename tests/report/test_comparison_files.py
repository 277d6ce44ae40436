"""The files and the table of a comparison: whole, offline, and words where a run chose them."""

import csv
import io
import re

import pytest
from comparing import command, printed, recipe, run_of
from made_up import COMPACT, FULL, HOSTILE, Tags, made_up_run, save
from markdown_it import MarkdownIt

from dnal_dist.common.text import spread
from dnal_dist.report import comparison, comparison_files, outputs, style


def test_the_legend_names_what_is_drawn(tmp_path):
    # Equal results: nothing lies between them.
    for weight in (1e-4, 2e-4):
        run_of(tmp_path / str(weight), recipe(weight), 0.5, 10**6, val=500)
    with style.drawing():
        (legend,) = [part.legends for part in comparison_files.figure(comparison.compare([tmp_path])).figure.subfigs]
    names = [text.get_text() for one in legend for text in one.get_texts()]
    assert "not dominated" not in names and any("these runs" in name for name in names)


def test_formulas_of_a_spreadsheet_are_written_as_words():
    formulas = {
        "-2+3+cmd|' /C calc'!A0": True,
        "=1": True,
        "+a": True,
        "@a": True,
        "-": True,
        "-2": False,
        "1e-4": False,
        "-inf": False,
    }
    assert {words: comparison_files._cell(words) == f"'{words}" for words in formulas} == formulas
    assert all(comparison_files._cell(words) == words for words, formula in formulas.items() if not formula)


@pytest.mark.parametrize(("mean", "std", "words"), [
    (161.17e6, 3e5, "161.2 ± 0.3 M"), (161.17e6, 1.26e6, "161 ± 1 M"), (0.198e6, 0.012e6, "198 ± 12 k"),
    (5e3, 0.0, "5.00 ± 0.00 k"),
    (4.09e9, 2e6, "4.090 ± 0.002 G"), (100.0, 0.7, "100.0 ± 0.7"),
])  # fmt: skip
def test_a_deviation_keeps_a_digit(mean, std, words):
    assert spread(mean, std) == words


def test_all_files_are_written_whole_and_offline(sweep):
    outputs.compare([sweep])
    for name in comparison.OUTPUTS:
        assert (sweep / name).stat().st_size > 200, name
    page = (sweep / "comparison.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "default-src 'none'" in page
    assert page.count('<tr class="own">') == len(comparison.compare([sweep]).front) + 2
    assert (sweep / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    before = (sweep / "pareto.svg").read_bytes()
    outputs.compare([sweep])
    assert (sweep / "pareto.svg").read_bytes() == before and b"<dc:date>" not in before


def test_hostile_names_stay_words(tmp_path):
    formula = "=HYPERLINK(1)"
    evil = [
        run_of(tmp_path / f"$x_{i}^2$ <b>|`", recipe(1e-4, i) | {"model": {"name": name}})
        for i, name in enumerate((HOSTILE, formula))
    ]
    outputs.compare(evil, str(tmp_path))
    assert "\x1b" not in printed(*evil)[0]
    tags = Tags((tmp_path / "comparison.html").read_text()).tags
    assert "script" not in tags and tags.count("img") == 1
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render((tmp_path / "comparison.md").read_text())
    inner = Tags(html)
    assert {"script", "b"}.isdisjoint(inner.tags) and inner.tags.count("img") == 1
    assert "<script>alert(1)</script>" in "".join(inner.text)
    head, *rows = csv.reader(io.StringIO((tmp_path / "comparison.csv").read_text()))
    assert not [cell for row in [head, *rows] for cell in row if cell.startswith("=")]
    assert "\x1b" not in (tmp_path / "pareto.svg").read_text()


def test_the_command_compares_and_refuses_in_a_line(sweep):
    done = command(*sorted(sweep.iterdir()), "--output", sweep / "out")
    assert done.returncode == 0 and "6 runs in 2 rows" in done.stdout and not done.stderr
    assert sorted(path.name for path in (sweep / "out").iterdir()) == sorted(comparison.OUTPUTS)
    done = command(*sorted(sweep.iterdir()))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {sweep / 'out'}: no run folder, nor one that holds some; give folders")


def test_bad_input_is_named(sweep, tmp_path):
    run = next(sweep.iterdir())
    (run / "recipe.yaml").write_text("name: [")
    with pytest.raises(ValueError, match=re.escape(f"{run / 'recipe.yaml'}: not valid YAML")):
        comparison.compare([sweep])
    with pytest.raises(ValueError, match="absent: no run folder"):
        comparison.compare([sweep / "absent", run])
    save(tmp_path / "a", [])
    save(tmp_path / "b", [])
    with pytest.raises(ValueError, match=f"none of its 2 runs has begun; see python -m dnal_dist.runs {tmp_path}$"):
        comparison.compare([tmp_path / "a", tmp_path / "b"])


def test_costs_of_the_digits_run_are_by_the_exact_rule(tmp_path):
    save(tmp_path / "a", made_up_run(), recipe="model: {name: vgg_digits}\nseed: 0\n")
    (row,) = comparison.compare([tmp_path / "a"]).rows
    assert (row.mean("macs"), row.mean("params")) == (COMPACT["exact"]["macs"], COMPACT["exact"]["params"])
    assert row.mean("macs_ratio") == COMPACT["exact"]["macs"] / FULL["exact"]["macs"] and row.std("macs") is None
