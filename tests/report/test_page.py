"""The run's page in a real browser: it goes through the search by pointer and keyboard, sorts, filters, and can be read."""

import re

import pytest
from made_up import HOSTILE

# Beside the other tests of pages, which are made once.
pytestmark = pytest.mark.xdist_group("pages")


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
    values = " ".join(shape.get_attribute(key) or "" for shape in shapes for key in ("x", "y", "width", "height", "d"))
    return [float(number) for number in re.findall(r"-?[\d.]+", values)]


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
