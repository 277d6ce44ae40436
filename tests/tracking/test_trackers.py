"""W&B and TensorBoard receive all values, read back from their files; and neither can stop or slow a run."""

import base64
import contextlib
import hashlib
import importlib.util
import json
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from in_process import called
from runs import SHORT, arguments, records, tensors, training_records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_read import offline

import dnal_dist.dashboard
from dnal_dist.common.span import attached
from dnal_dist.recipe import load
from dnal_dist.tracking import dashboard, values
from dnal_dist.tracking import wandb as wandb_tracker
from dnal_dist.tracking.wandb import wandb_mode
from dnal_dist.training.stopping import STOPPED, Stopped

wandb = pytest.importorskip("wandb", reason="wandb is not installed")
TRACKED = [change for change in SHORT if "tracker" not in change]
# Recorded only by runs on several processes, or on a GPU.
ELSEWHERE = {"train/comm/bytes_weight_step", "train/comm/bytes_architecture_step", "train/device_memory_bytes"}


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    """The user of this machine may be logged in to W&B."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture(scope="module")
def run(train_here, digits, tmp_path_factory):
    """A run offline that stopped once, on a machine whose GPU has a memory of its own."""
    run = tmp_path_factory.mktemp("offline") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        first = train_here(*arguments(digits, run, *TRACKED), "--max-time=1s")
        assert first.code == STOPPED, first.err
        second = train_here(*arguments(digits, run, *TRACKED), report=True)
        assert second.code == 0 and "warning" not in second.out + second.err, second.out + second.err
    return run


@pytest.fixture(scope="module")
def found(run):
    return offline(run)


def test_wandb_has_the_recipe_and_the_environment_of_the_run(run, found):
    assert found.config["seed"] == 0 and found.config["phases"]["search"]["steps"] == 4
    assert found.config["start"]["host"] == records(run, "start")[-1]["host"]


def test_a_resumed_run_is_one_run_with_the_steps_of_the_record(run, found):
    (name,) = {r["tracker_run"] for r in records(run, "start")}
    assert found.ids == [name, name] and found.names_shown == ["digits run"] * 2
    assert found.metrics["*"] == "global_step"
    # W&B would ignore rows whose own step it has seen, also after all parts are put together.
    steps = found.series("_step")
    assert len(steps) > 20 and steps == sorted(set(steps))
    rows = [row for row in found.history if "train/loss" in row]
    assert [row["global_step"] for row in rows] == list(range(1, 13))


def test_wandb_receives_the_values_of_the_record(run, found):
    for name in ("cross_entropy", "accuracy", "learning_rate", "images_per_second", "data_wait_seconds", "expected_macs"):
        assert found.series(f"train/{name}") == [r[name] for r in records(run, "train") if name in r]
    evaluated = [r["accuracy"] for r in records(run, "eval") if r["phase"] != "prune"]
    assert found.series("eval/accuracy") == evaluated
    (pruned,) = records(run, "prune")
    assert found.series("prune/macs_compact") == [pruned["compact"]["exact"]["macs"]]
    assert found.series("prune/params_full_paper_rule") == [pruned["full"]["paper"]["params"]]
    assert found.series("prune/accuracy") == [r["accuracy"] for r in records(run, "eval") if r["phase"] == "prune"]
    for record in records(run, "phase"):
        for key in ("seconds", "images", "device_seconds"):
            assert found.series(f"ledger/{record['phase']}/{key}") == [record[key]]


def test_gates_are_a_histogram_and_open_fractions_by_site(run, found):
    gates, sites = records(run, "gates"), records(run, "start")[0]["sites"]
    shown = found.series("gates/histogram")
    assert [one["values"] for one in shown] == [r["histogram"] for r in gates]
    assert all(one["_type"] == "histogram" and one["bins"][0] == 0 and one["bins"][-1] == 1 for one in shown)
    for site, channels in sites.items():
        assert found.series(f"gates/open_share/{site}") == [r["open"][site] / channels for r in gates]


def test_channels_are_a_table(run, found):
    (table,) = found.tables.values()
    (pruned,), sites = records(run, "prune"), records(run, "start")[0]["sites"]
    assert table["columns"] == ["site", "channels", "kept", "share"]
    assert [row[:3] for row in table["data"]] == [[site, n, pruned["kept"][site]] for site, n in sites.items()]
    assert found.series("prune/sites")[0]["_type"] == "table-file"


def test_the_summary_has_the_final_table_and_the_best_accuracy(run, found):
    (pruned,) = records(run, "prune")
    full, kept = pruned["full"]["exact"], pruned["compact"]["exact"]
    assert found.summary["result/macs_full"] == full["macs"] and found.summary["result/macs_compact"] == kept["macs"]
    assert found.summary["result/params_ratio"] == pytest.approx(kept["params"] / full["params"])
    for phase in ("pretrain", "search", "prune", "finetune"):
        last = [r["accuracy"] for r in records(run, "eval") if r["phase"] == phase][-1]
        assert found.summary[f"result/accuracy_{phase}"] == last
    assert found.summary["result/channels_kept"] == sum(pruned["kept"].values())
    assert found.summary["result/images"] == 3 * 64
    assert found.summary["eval/accuracy"] == {"max": max(found.series("eval/accuracy")), "last": found.series("eval/accuracy")[-1]}


def test_the_compact_network_and_the_report_are_artifacts(run, found):
    (name,) = set(found.ids)
    compact, report = found.artifacts["digits-run-compact"], found.artifacts["digits-run-report"]
    assert (compact.type, report.type) == ("model", "report")
    contents = {entry.path: entry for artifact in (compact, report) for entry in artifact.manifest.contents}
    assert contents.keys() >= {"architecture.json", "weights.safetensors", "report.html", "metrics.jsonl", "recipe.yaml"}
    for path, entry in contents.items():
        # As they lie in the run folder, and from wherever they are sent.
        content = Path(entry.local_path).read_bytes()
        assert entry.local_path.startswith(f"{run}/") and entry.size == len(content), path
        assert base64.b64decode(entry.digest) == hashlib.md5(content).digest(), path
    assert name in compact.aliases and name in report.aliases
    # Nothing lies outside the run folder either, which may be synced on another machine.
    assert all(entry.local_path.startswith(f"{run}/") for one in found.artifacts.values() for entry in one.manifest.contents)


def test_the_dashboard_shows_only_recorded_metrics(found):
    shown = {name for panels in dashboard.SECTIONS.values() for panel in panels for name in panel.metrics}
    assert "gates/open_share/.*" in shown
    shown = {name.replace(".*", "stages.0.0") for name in shown}
    assert shown - found.names == ELSEWHERE


def test_wandb_accepts_the_definition_of_the_dashboard():
    spec = json.dumps(dashboard.spec(dashboard.workspace("team", "project", "view")))
    for title, panels in dashboard.SECTIONS.items():
        assert title in spec
        for panel in panels:
            assert all(json.dumps(name)[1:-1] in spec for name in panel.metrics), panel
    sections = dashboard.spec(dashboard.workspace("team", "project", "view"))["section"]["panelBankConfig"]["sections"]
    assert [len(section["panels"]) for section in sections] == [len(panels) for panels in dashboard.SECTIONS.values()]


@pytest.mark.parametrize(("options", "code", "message"), [
    (["--dry-run"], 0, "open fraction by site: gates/open_share/.*"),
    (["--json"], 0, '"metricRegex": "gates/open_share/.*"'),
    ([], 2, "error: W&B finds no API key: use `wandb login`, or set WANDB_API_KEY"),
])  # fmt: skip
def test_the_dashboard_command_sends_nothing_unless_it_saves(monkeypatch, capsys, options, code, message):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it opened a connection"))
    ended = called(dnal_dist.dashboard.main, capsys, "--entity=team", "--project=project", *options)
    assert ended.code == code and message in ended.out + ended.err


def test_wandb_is_online_only_if_logged_in(monkeypatch, tmp_path):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it opened a connection"))
    assert wandb_mode(None) == ("offline", None)
    mode, remark = wandb_mode("online")
    assert mode == "offline" and "wandb login" in remark
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'k' * 40}\n")
    assert wandb_mode(None) == wandb_mode("online") == ("online", None)
    assert wandb_mode("offline") == ("offline", None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(None) == ("offline", None)
    assert wandb_mode("online") == ("online", None)
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode(None) == ("online", None)


def test_wandb_is_off_where_the_environment_disables_it(monkeypatch):
    monkeypatch.setenv("WANDB_DISABLED", "true")
    mode, remark = wandb_mode("online")
    assert mode == "disabled" and "WANDB_DISABLED" in remark


@pytest.mark.parametrize(("name", "safe"), [("Größe 大/x", "Groe-x"), ("大", "run"), ("a" * 200, "a" * 100), ("x=1,y", "x-1-y")])
def test_names_are_safe_for_wandb(name, safe):
    assert wandb_tracker.safe(name) == safe
    wandb.Artifact(f"{safe}-report", "report")


def test_another_name_of_the_project_is_reported_in_one_line(tmp_path):
    given = []

    def start_tracker(project, *_):
        given.append(project)
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    for project, said in (("Größe", "calls the project 'Größe' 'Groe', of the letters that it takes"), ("plain_1", "")):
        recipe = load("recipes/digits.yaml", [f"tracking.project={project}"])
        tracker = wandb_tracker.Wandb(tmp_path, recipe, SimpleNamespace(start_tracker=start_tracker), "id", "offline")
        assert tracker.start(0) == said
    assert given == ["Groe", "plain_1"]


def test_a_server_that_never_answers_is_not_waited_for(train_here, digits, finished, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setattr(wandb_tracker, "INIT_SECONDS", 1.0)
        ended = train_here(*arguments(digits, tmp_path / "run", *TRACKED))
        server.settimeout(1)
        server.accept()  # W&B tried
    assert ended.code == 0, ended.err
    (warning,) = records(tmp_path / "run", "warning")
    assert warning["message"].startswith("W&B cannot be reached and runs offline, send the run later by `wandb sync` (")
    assert tensors(tmp_path / "run") == tensors(finished)
    found = offline(tmp_path / "run")
    assert found.series("train/loss") == [r["loss"] for r in records(tmp_path / "run", "train")]
    assert found.artifacts.keys() >= {"digits-run-compact", "digits-run-report"}
    assert not services()


def services() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == "wandb-core"]


def test_a_run_survives_the_end_of_the_wandb_service(train_here, digits, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")

    def kill_before_the_search(name, _):
        if name == "search":
            kill()
        return contextlib.nullcontext()

    def kill():
        (service,) = services()
        # Long before W&B would write by itself, its values are on disk.
        until = time.monotonic() + 8
        while len(offline(tmp_path / "run").series("train/loss")) < 4 and time.monotonic() < until:
            time.sleep(0.1)
        service.terminate()
        service.wait()

    with attached(kill_before_the_search):
        ended = train_here(*arguments(digits, tmp_path / "run", *TRACKED))
    assert ended.code == 0, ended.err
    (warning,) = records(tmp_path / "run", "warning")
    assert warning["message"].startswith("W&B stopped taking records; the run goes on without it (")
    assert training_records(tmp_path / "run") == training_records(finished) and tensors(tmp_path / "run") == tensors(finished)
    assert not services()
    rows = [row for row in offline(tmp_path / "run").history if "train/loss" in row]
    assert [row["global_step"] for row in rows][:4] == [1, 2, 3, 4], "all of the pretrain"


@pytest.mark.parametrize(("folder", "shown"), [
    ("digits", "digits"), ("digits_2", "digits_2"), ("penalty_weight=0.02,seed=1", "digits penalty_weight=0.02,seed=1"),
])  # fmt: skip
def test_runs_of_a_sweep_have_names_of_their_own(folder, shown):
    assert values.shown_name(Path("runs", folder), "digits") == shown
    assert len(values.shown_name(Path("x" * 200 + folder), "digits")) == 100


def test_numbers_alone_are_sent_as_scalars():
    record = {"phase": "search", "step": 1, "device_memory_bytes": 5_000, "resumed": True, "breakdown": {"forward": 1.0}}
    assert values.sent("train", record, {}).scalars == {"train/step": 1, "train/device_memory_bytes": 5_000}
    assert values.sent("phase", record, {}).scalars["ledger/search/device_memory_bytes"] == 5_000


def test_tensorboard_receives_the_same_values(train_here, digits, tmp_path):
    """Of a run that stopped once; values after the checkpoint that it resumed from are not shown twice."""
    run, saved = tmp_path / "run", []
    changes = [*TRACKED, "tracking.tracker=tensorboard"]

    def stop_before_the_second_checkpoint(name, _):
        if name == "checkpoint":
            saved.append(name)
            if len(saved) == 2:
                raise Stopped("test")
        return contextlib.nullcontext()

    with attached(stop_before_the_second_checkpoint):
        assert train_here(*arguments(digits, run, *changes)).code == STOPPED
    repeated = [r["global_step"] for r in records(run, "train")]
    assert repeated == [1, 2, 3, 4] and not (run / "wandb").exists()
    ended = train_here(*arguments(digits, run, *changes))
    assert ended.code == 0 and "warning" not in ended.out + ended.err, ended.out + ended.err
    shown = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "histograms": 0, "tensors": 0}).Reload()
    for name, kind in (("loss", "train"), ("images_per_second", "train"), ("expected_macs", "train")):
        expected = [(r["global_step"], r[name]) for r in records(run, kind) if name in r]
        assert [(e.step, e.value) for e in shown.Scalars(f"{kind}/{name}")] == [(s, pytest.approx(v)) for s, v in expected]
    gates, (pruned,), sites = records(run, "gates"), records(run, "prune"), records(run, "start")[0]["sites"]
    histograms = shown.Histograms("gates/histogram")
    assert [(e.step, e.histogram_value.bucket) for e in histograms] == [(r["global_step"], r["histogram"]) for r in gates]
    site = next(iter(sites))
    assert [e.value for e in shown.Scalars(f"gates/open_share/{site}")] == pytest.approx(
        [r["open"][site] / sites[site] for r in gates]
    )
    (table,) = shown.Tensors("prune/sites/text_summary")
    assert f"| {site} | {sites[site]} | {pruned['kept'][site]} | " in table.tensor_proto.string_val[0].decode()
    assert "penalty_weight" in shown.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    (result,) = shown.Scalars("result/macs_compact")
    assert result.value == pruned["compact"]["exact"]["macs"]


def test_a_missing_tensorboard_package_is_named(train_here, digits, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else find(name, *more))
    ended = train_here(*arguments(digits, tmp_path / "run", *TRACKED, "tracking.tracker=tensorboard"))
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith(
        "error: key 'tracking.tracker': tensorboard needs the package tensorboard: pip install 'dnal-dist[tensorboard]'"
    )
