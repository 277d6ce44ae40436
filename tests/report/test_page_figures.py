"""The figures of the run's page in a real browser: values at the pointer, and zoom."""

import pytest
from made_up import numbers_in
from paged import RUNS

from dnal_dist.report import comparison, comparison_files

# Beside the other tests of pages, which are made once.
pytestmark = pytest.mark.xdist_group("pages")


def test_the_image_shows_numbers_by_pointer_and_keyboard(opened, pages):
    page = opened(pages["supernet"])
    box = page.locator('.box[data-name="stages.1.cells.2.k5e6"]')
    box.hover()
    assert page.inner_text("#readout") == "stages.1.cells.2.k5e6: 4 of 48 hidden channels; 2 of 24 output channels"
    assert box.locator("title").text_content() == page.inner_text("#readout")
    page.focus("#position")
    page.keyboard.press("Home")
    assert page.inner_text("#readout").endswith("48 of 48 hidden channels; 24 of 24 output channels")
    page.keyboard.press("Tab")
    assert page.inner_text("#readout").startswith("first.depthwise: 32 of 32 channels")
    page.keyboard.press("End")
    assert page.inner_text("#readout").startswith("last: 64 of 64 channels")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#readout").startswith("stages.5.cells.0.k7e6: ")
    assert page.locator(".network .box").count() == 21 * 6 + 3
    assert page.locator(".network .around").count() == 15


def pointed(page, figure: str, panel: int, series: str, number: int) -> str:
    """What the page shows with the pointer on a value of a figure."""
    found = numbers_in(page.content())["figures"][figure][panel]["series"]
    (one,) = [values for values in found if values["name"] == series]
    page.locator(f"#{figure} svg").scroll_into_view_if_needed()
    x, y = page.evaluate(
        """([id, x, y]) => {
          const at = new DOMPoint(x, y).matrixTransform(document.querySelector(`#${id} svg`).getScreenCTM());
          return [at.x, at.y];
        }""",
        [figure, one["x"][number], one["y"][number]],
    )
    page.mouse.move(x, y)
    return page.locator(f"#{figure} .tip").inner_text()


def test_the_pointer_shows_the_values_of_figures(opened, pages):
    page = opened(pages["finished"])
    assert pointed(page, "curves", 0, "held-out images", -1).split("\n") == [
        "training batches, iteration 90: 90.00 %",
        "held-out images, iteration 90: 99.44 %",
    ]
    assert "after pruning, iteration 50: 0.2000" in pointed(page, "curves", 1, "after pruning", 0)
    assert page.locator("#curves .mark").count() >= 2
    assert pointed(page, "search", 0, "gates", 0) == "gates, epoch 0, delta 1, gates near 0.475: 40"
    assert pointed(page, "search", 2, "expected", 1) == "expected, epoch 2: 500 k"
    assert pointed(page, "cost", 0, "DNAL, by penalty weight", 2).startswith("DNAL, by penalty weight, 1e-4, 93.20 % at 36.94")
    page.mouse.move(2, 2)
    assert page.locator(".tip:visible").count() == 0


def test_a_figure_zooms_into_a_box_and_shows_all_of_it_again(opened, pages):
    page = opened(pages["finished"])
    svg, reset = page.locator("#curves svg"), page.locator("#curves .reset")
    whole, box = svg.get_attribute("viewBox"), svg.bounding_box()

    def drag(*corners):
        svg.scroll_into_view_if_needed()
        here = svg.bounding_box()
        (x0, y0), (x1, y1) = [(here["x"] + here["width"] * x, here["y"] + here["height"] * y) for x, y in corners]
        page.mouse.move(x0, y0)
        page.mouse.down()
        page.mouse.move(x1, y1, steps=3)
        page.mouse.up()
        return [float(number) for number in svg.get_attribute("viewBox").split()]

    width, height = [float(number) for number in whole.split()][2:]
    view = drag((0.25, 0.25), (0.75, 0.5))
    assert view == pytest.approx([0.25 * width, 0.25 * height, 0.5 * width, 0.25 * height], abs=1.5)
    assert reset.is_visible() and svg.bounding_box()["height"] == pytest.approx(box["height"], abs=1)
    page.keyboard.down("Shift")
    moved = drag((0.5, 0.5), (0.4, 0.5))
    page.keyboard.up("Shift")
    assert moved[0] > view[0] + 1 and moved[2:] == view[2:]
    assert pointed(page, "curves", 0, "held-out images", 3) != ""
    reset.click()
    assert svg.get_attribute("viewBox") == whole and not reset.is_visible()
    drag((0.3, 0.3), (0.6, 0.6))
    svg.dblclick(position={"x": 100, "y": 100})
    assert svg.get_attribute("viewBox") == whole


@pytest.mark.parametrize("name", RUNS)
def test_every_run_fits_both_widths_and_both_schemes_can_be_read(opened, pages, name):
    page = opened(pages[name])
    for width, scheme in ((1280, "dark"), (1280, "light"), (400, "light"), (400, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(FAINT) == []
    assert page.locator(".plot svg").count() > 0


def test_a_comparison_names_its_runs_and_fits_both_widths(opened, sweep):
    """Its tables too, none of which is to be scrolled sideways."""
    comparison_files.write(comparison.compare([sweep]), sweep)
    page = opened(sweep / "comparison.html")
    for width, scheme in ((1280, "dark"), (1280, "light"), (400, "light"), (400, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.querySelectorAll('.scroll')].every(one => one.scrollWidth <= one.clientWidth)")
        assert page.evaluate(FAINT) == []
        assert page.locator("table.comparison", has_text="3: 0.0001-0, 0.0001-1, 0.0001-2").is_visible()


def test_the_page_may_ask_for_nothing(opened, pages):
    page = opened(pages["finished"])
    tried = page.evaluate("fetch('https://example.org/').then(() => 'answered', () => 'refused')")
    assert (tried, page.evaluate("violations.splice(0)")) == ("refused", ["connect-src"])
    complaints = [opened.complaints.pop() for _ in range(len(opened.complaints))]
    assert complaints and all("Content Security Policy" in one for one in complaints)


# Texts whose colour stands out too little from what lies behind them: 4.5 to 1, large ones 3 to 1 (WCAG 2, level AA).
FAINT = """() => {
  const parse = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((value, i) => value * a + below[i] * (1 - a));
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    if (!element) return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
    const own = parse(getComputedStyle(element).backgroundColor);
    return own[3] === 0 ? behind(element.parentElement) : over(own, behind(element.parentElement));
  };
  const faint = [], seen = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (seen.nextNode()) {
    const text = seen.currentNode.data.trim(), element = seen.currentNode.parentElement;
    if (!text || ["SCRIPT", "NOSCRIPT", "STYLE", "title"].includes(element.tagName) || !element.checkVisibility()) continue;
    const style = getComputedStyle(element), ground = behind(element);
    const colour = over(parse(element.ownerSVGElement ? style.fill : style.color), ground);
    const [high, low] = [light(colour), light(ground)].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if ((high + 0.05) / (low + 0.05) < (large ? 3 : 4.5)) faint.push(`${text}: ${colour} on ${ground}`);
  }
  return faint;
}"""
