"""Chromium as the system has it, without a network; pages whose complaints are kept."""

import shutil
from datetime import datetime
from pathlib import Path

import pytest
from comparing import ACCURACIES, MACS, recipe, run_of
from made_up import save
from paged import RUNS

from dnal_dist.report import outputs

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
# What the page's security policy forbids comes as an event, whoever listens.
LISTEN = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""
# A page as it was: the slider at its end, nothing sought.
RESET = """() => {
  const set = (id, value, heard) => {
    const control = document.getElementById(id);
    if (!control) return;
    control.value = value;
    control.dispatchEvent(new Event(heard));
  };
  set("filter", "", "input");
  set("state", "", "change");
  set("position", document.getElementById("position")?.max, "input");
}"""


@pytest.fixture(scope="session")
def chromium():
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=list(QUIET))
        yield browser
        browser.close()


class Opened:
    """Pages of files, offline, each loaded once for all tests; what they complained of and asked for."""

    def __init__(self, browser):
        self.browser, self.pages, self.complaints, self.asked = browser, {}, [], []

    def __call__(self, path: Path, fresh: bool = False, clock: bool = False, javascript: bool = True):
        """The page of `path` as it was when it was loaded, 1280 wide and light. fresh: loaded anew; clock: time passes only where
        the test says so."""
        key = (path, clock, javascript)
        if fresh and key in self.pages:
            self.pages.pop(key).context.close()
        if key not in self.pages:
            self.pages[key] = self._load(path, clock, javascript)
        page = self.pages[key]
        page.set_viewport_size({"width": 1280, "height": 900})
        page.emulate_media(color_scheme="light", reduced_motion="no-preference")
        if javascript:
            page.evaluate(RESET)
        return page

    def _load(self, path: Path, clock: bool, javascript: bool):
        page = self.browser.new_context(offline=True, java_script_enabled=javascript).new_page()
        page.set_default_timeout(20_000)
        page.add_init_script(LISTEN)
        page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.asked.append(request.url) if request.url != path.as_uri() else None)
        if clock:
            page.clock.install(time=datetime(2026, 1, 1))
        page.goto(path.as_uri())
        if clock:
            # Or it would go on by itself beside the test's own steps.
            page.clock.pause_at(datetime(2026, 1, 2))
        return page


@pytest.fixture(scope="session")
def loaded(chromium) -> Opened:
    return Opened(chromium)


@pytest.fixture
def opened(loaded) -> Opened:
    """Opens pages; at the test's end none may have complained of anything, or asked for anything but itself."""
    yield loaded
    for (_, _, javascript), page in loaded.pages.items():
        loaded.complaints += page.evaluate("violations.splice(0)") if javascript else []
    complaints, asked = loaded.complaints, loaded.asked
    loaded.complaints, loaded.asked = [], []
    # What a figure makes an image of itself of is data, not asked for.
    assert complaints == [] and [url for url in asked if not url.startswith(("data:", "blob:"))] == []


@pytest.fixture
def sweep(tmp_path):
    """Two penalty weights, three seeds each; the runs differ in what has no say in the result, too."""
    for weight, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            settings = recipe(weight, seed, output=f"runs/{seed}", tracking={"log_every": seed + 1}, name=f"vgg {seed}")
            (tmp_path / "sweep").mkdir(exist_ok=True)
            run_of(tmp_path / "sweep" / f"{weight}-{seed}", settings, accuracy, MACS[weight][seed])
    return tmp_path / "sweep"


@pytest.fixture(scope="session")
def pages(chromium, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("pages")
    recipe = "name: digits\nmodel: {name: resnet56_cifar}\nphases: {search: {epochs: 3}}\narchitecture: {penalty_weight: 0.0001}\n"
    for name, records in RUNS.items():
        outputs.write_all(save(folder / name, records(), recipe=recipe), draw=False)
    return {name: folder / name / "report.html" for name in RUNS}
