"""The run's page in a real browser: it goes through the search by pointer and keyboard, sorts, filters, and can be read."""

import re

import pytest
from test_report import HOSTILE, changed, made_up_run, numbers_in, save

from dnal_dist.report import outputs

COSTS = {
    "conv0.conv": {"full": {"macs": 900, "params": 90}, "compact": {"macs": 300, "params": 30}},
    "conv1.conv": {"full": {"macs": 5000, "params": 500}, "compact": {"macs": 1000, "params": 100}},
    "conv2.conv": {"full": {"macs": 7000, "params": 700}, "compact": {"macs": 0, "params": 0}},
    "classifier": {"full": {"macs": 80, "params": 88}, "compact": {"macs": 20, "params": 28}},
}
COUNTS = [
    {"conv0": [0] * 5 + [8] + [0] * 4, "conv1": [0] * 5 + [16] + [0] * 4, "conv2": [0] * 5 + [16] + [0] * 4},
    {"conv0": [3, 2, *[0] * 6, 1, 2], "conv1": [4] * 2 + [0] * 6 + [4] * 2, "conv2": [8, 7, *[0] * 7, 1]},
    {"conv0": [7, *[0] * 8, 1], "conv1": [12, *[0] * 8, 4], "conv2": [16, *[0] * 9]},
]
OPEN = [{"conv0": 0, "conv1": 0, "conv2": 0}, {"conv0": 3, "conv1": 8, "conv2": 1}, {"conv0": 1, "conv1": 4, "conv2": 0}]


def told_in_full() -> list[dict]:
    """The finished run, with all that today's records tell beside what those of older runs did."""
    looks = iter(zip(COUNTS, OPEN, strict=True))
    records = []
    for record in made_up_run():
        if record["kind"] == "gates":
            counts, opened = next(looks)
            record = record | {"by_site": counts, "open": opened}
        elif record["kind"] == "phase":
            record = record | {"images": 640, "device_seconds": 40.0, "bytes_sent": 3_200_000, "energy_kwh": 0.25}
        records.append(record)
    where = {"host": "node7", "code": "0123abc+", "slurm_job": "812", "environment": {"nccl": "2.27.3"}, "shortcuts": ["conv1"]}
    records = changed(changed(records, "prune", layers=COSTS), "start", **where)
    skipped = [[7, "train-000000.tar", 512, "00007", "not an image"]]
    receipt = {"kind": "receipt", "global_step": 90, "epoch": 0, "batches": 90, "samples": 5759, "digest": "ab" * 16}
    return [*records, receipt | {"ordered": "cd" * 16, "skipped": skipped}]


def supernet() -> list[dict]:
    """A search of 255 sites in cells, not over yet."""
    names = [f"k{kernel}e{expansion}.{which}" for kernel in (3, 5, 7) for expansion in (3, 6) for which in ("depthwise", "project")]
    sites = {"first.depthwise": 32, "first.project": 16}
    sites |= {
        f"stages.{cell // 4}.cells.{cell % 4}.{name}": 24 + 24 * ("depthwise" in name) for cell in range(21) for name in names
    }
    sites["last"] = 64
    start = made_up_run()[0] | {
        "name": "supernet",
        "sites": sites,
        "shortcuts": [f"stages.{s}.cells.{c}" for s in range(5) for c in (1, 2, 3)],
    }
    looks = [
        {
            "kind": "gates", "time": 1_790_000_000 + step, "global_step": step, "phase": "search", "step": step,
            "epoch": step / 10, "delta": 2.0**step, "histogram": [sum(sites.values()), *[0] * 19],
            "open": {site: channels // (step + 1) for site, channels in sites.items()},
            "by_site": {site: [channels, *[0] * 9] for site, channels in sites.items()},
        }
        for step in range(10)
    ]  # fmt: skip
    return [start, *looks]


def hostile() -> list[dict]:
    name = f"stages.0.{HOSTILE}"
    records = changed(told_in_full(), "start", sites={name: 8, "conv1": 16, "conv2": 16}, host=HOSTILE, code=HOSTILE)
    records = changed(
        records, "prune", kept={name: 1, "conv1": 4, "conv2": 0}, layers={f"{name}.conv": COSTS["conv0.conv"], **COSTS}
    )
    records = changed(records, "receipt", skipped=[[HOSTILE] * 5], digest=HOSTILE)
    return changed(records, "gates", open={name: 1}, by_site={name: [1] * 10, "conv1": [1] * 10, "conv2": [1] * 10})


def unfinished() -> list[dict]:
    records = told_in_full()
    return records[: [record["kind"] for record in records].index("prune") - 2]


RUNS = {
    "finished": told_in_full,
    "older": made_up_run,
    "unfinished": unfinished,
    "pretraining": lambda: made_up_run()[:3],
    "supernet": supernet,
    "hostile": hostile,
}


@pytest.fixture(scope="session")
def pages(chromium, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("pages")
    recipe = "name: digits\nmodel: {name: resnet56_cifar}\nphases: {search: {epochs: 3}}\narchitecture: {penalty_weight: 0.0001}\n"
    for name, records in RUNS.items():
        outputs.write_all(save(folder / name, records(), recipe=recipe), draw=False)
    return {name: folder / name / "report.html" for name in RUNS}


def shown(page) -> dict:
    """What the page shows of where its slider stands."""
    return {
        "value": page.input_value("#position"),
        "words": page.inner_text("#words"),
        "spoken": page.get_attribute("#position", "aria-valuetext"),
        "channels": page.locator(".layers tbody tr[data-site] .channels").all_inner_texts(),
        "filled": [float(box.get_attribute("height")) for box in page.locator(".network .fill").all()],
        "pale": [float(box.get_attribute("height")) for box in page.locator(".network .pale").all()],
        "strips": [path.get_attribute("d") for path in page.locator(".layers .gates path").all()],
    }


def numbers(shapes: list) -> list[float]:
    """All of a drawing's numbers."""
    told = " ".join(shape.get_attribute(key) or "" for shape in shapes for key in ("x", "y", "width", "height", "d"))
    return [float(number) for number in re.findall(r"-?[\d.]+", told)]


def visible(page) -> list[str]:
    return page.locator(".layers tbody tr:visible th").all_inner_texts()


def test_the_keyboard_moves_through_the_search(opened, pages):
    page = opened(pages["finished"])
    after = shown(page)
    assert after["words"] == after["spoken"] == "after pruning: 5 of 40 channels kept"
    assert after["channels"] == ["1 of 8", "4 of 16", "0 of 16"]
    page.focus("#position")
    page.keyboard.press("Home")
    first = shown(page)
    assert first["words"] == first["spoken"] == "epoch 0 of 3, delta 1: 0 of 40 gates open, 40 undecided"
    assert (first["value"], first["channels"], first["filled"]) == ("0", ["0 of 8", "0 of 16", "0 of 16"], [0, 0, 0])
    assert all(strip.count("M") == 1 for strip in first["strips"])
    page.keyboard.press("ArrowRight")
    second = shown(page)
    assert (second["value"], second["channels"]) == ("1", ["3 of 8", "8 of 16", "1 of 16"])
    assert [strip.count("M") for strip in second["strips"]] == [4, 4, 3]
    # The box of 16 channels is the highest: half of them fill half of it, and those that are not decided yet stand out around.
    assert second["filled"][1:] == pytest.approx([96 / 2, 96 / 16], abs=0.1)
    assert second["pale"][1:] == pytest.approx([96 * 12 / 16, 96 * 8 / 16], abs=0.1)
    page.keyboard.press("End")
    assert shown(page) == after


def test_the_pointer_drags_through_the_search(opened, pages):
    page = opened(pages["finished"])
    box = page.locator("#position").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] - 8, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 3, middle, steps=4)
    assert shown(page)["channels"] == ["3 of 8", "8 of 16", "1 of 16"]
    page.mouse.move(box["x"] + 2, middle, steps=4)
    page.mouse.up()
    assert shown(page)["value"] == "0"


def test_without_a_script_the_last_state_and_all_tables_are_there(opened, pages):
    moved = opened(pages["finished"])
    page = opened(pages["finished"], javascript=False)
    assert page.locator(".layers tbody tr .channels").all_inner_texts() == ["1 of 8", "4 of 16", "0 of 16", "no gates"]
    assert page.locator(".layers tfoot .cost").all_inner_texts() == ["13\u00a0k", "1.32\u00a0k", "1.38\u00a0k", "158"]
    # Both draw the same image: one in Python, the other by script.
    for part in (".fill", ".hull", ".gates path"):
        script, plain = (numbers(one.locator(part).all()) for one in (moved, page))
        assert script and script == pytest.approx(plain, abs=0.02)
    assert not page.locator(".slider").is_visible() and not page.locator(".filter").is_visible()


def test_play_goes_from_the_beginning_to_the_end(opened, pages):
    page = opened(pages["finished"], clock=True)
    page.click("#play")
    assert (shown(page)["value"], page.inner_text("#play")) == ("0", "Pause")
    page.clock.run_for(501)
    assert shown(page)["value"] == "1"
    page.click("#play")
    page.clock.run_for(5000)
    assert (shown(page)["value"], page.inner_text("#play")) == ("1", "Play")
    page.click("#play")
    page.clock.run_for(5000)
    assert (shown(page)["value"], page.inner_text("#play")) == ("3", "Play")


def test_play_gives_single_images_to_whom_motion_disturbs(opened, pages):
    page = opened(pages["finished"], clock=True)
    page.emulate_media(reduced_motion="reduce")
    page.click("#play")
    page.clock.run_for(900)
    assert shown(page)["value"] == "0"
    page.clock.run_for(200)
    assert shown(page)["value"] == "1"


def test_layers_are_filtered_and_sorted(opened, pages):
    page = opened(pages["finished"])
    order = ["conv0", "conv1", "conv2", "classifier"]
    assert visible(page) == order and page.inner_text("#shown") == ""
    page.fill("#filter", "CONV1")
    assert visible(page) == ["conv1"] and page.inner_text("#shown") == "1 of 4 layers"
    page.fill("#filter", "")
    page.select_option("#state", "closed")
    assert visible(page) == ["conv2"]
    page.select_option("#state", "")
    head = page.locator(".layers thead th", has_text="MACs, compact")
    for expected, sort in (
        (["conv1", "conv0", "classifier", "conv2"], "descending"),
        (["conv2", "classifier", "conv0", "conv1"], "ascending"),
        (order, None),
    ):
        head.locator("button").press("Enter")
        assert visible(page) == expected and head.get_attribute("aria-sort") == sort
    # Where the slider goes, what is closed is looked for anew.
    page.select_option("#state", "closed")
    page.focus("#position")
    page.keyboard.press("Home")
    assert visible(page) == []
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert visible(page) == ["conv2"]


def test_the_image_tells_numbers_by_pointer_and_keyboard(opened, pages):
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


def test_the_tab_key_reaches_every_control_in_its_order(opened, pages):
    page = opened(pages["finished"], fresh=True)
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(e => e.id || e.textContent.trim() || e.className)(document.activeElement)"))
    controls = ["play", "position", "filter", "state", "layer", "channels", "fraction", "parameters, compact"]
    places = [reached.index(control) for control in controls]
    assert places == sorted(places)
    assert any(one.startswith("conv0") for one in reached[places[1] : places[2]])
    assert reached.count("Play") == 0 and any("recipe" in one for one in reached)


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


def test_an_older_run_shows_open_gates_without_histograms(opened, pages):
    page = opened(pages["older"])
    assert page.locator(".layers .gates").count() == 0 and page.locator(".layers .cost").count() == 0
    page.focus("#position")
    page.keyboard.press("Home")
    assert shown(page)["channels"] == ["1 of 8", "1 of 16", "1 of 16"]
    assert page.locator(".network .around").count() == 0


def test_an_unfinished_run_stands_at_its_last_record(opened, pages):
    page = opened(pages["unfinished"])
    assert shown(page)["words"] == "epoch 2 of 3, delta 10,000: 5 of 40 gates open"
    assert "Not finished" in page.inner_text("header") and page.locator(".layers .cost").count() == 0
    page = opened(pages["pretraining"])
    assert page.locator("#position").count() == 0
    assert page.locator(".layers .channels").all_inner_texts()[1:] == ["8 of 8", "16 of 16", "16 of 16"]
    page.locator(".box").first.hover()
    assert page.inner_text("#readout") == "conv0: 8 of 8 channels"


def test_hostile_names_are_only_text(opened, pages):
    page = opened(pages["hostile"])
    page.focus("#position")
    page.keyboard.press("Home")
    page.locator(".box").first.hover()
    assert page.inner_text("#readout").startswith(f"stages.0.{HOSTILE}"[:30])
    page.fill("#filter", "<img")
    assert len(visible(page)) == 1
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2


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
