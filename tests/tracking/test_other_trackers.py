"""MLflow through a stand-in, and what a machine without W&B says."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.tracking import values
from dnal_dist.tracking.mlflow import MLflow
from dnal_dist.tracking.run_log import RunLog


class Library(ModuleType):
    """What MLflow's server would hold."""

    def __init__(self):
        super().__init__("mlflow")
        self.uri, self.runs, self.dicts = None, [], {}

    def set_tracking_uri(self, uri):
        self.uri = uri

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="1") if self.runs else None

    def search_runs(self, experiments, condition, **_):
        return [SimpleNamespace(info=SimpleNamespace(run_id=f"id of {run}")) for run in self.runs if f"'{run}'" in condition]

    def log_dict(self, content, name):
        self.dicts[name] = content


class Context:
    """A main process whose Accelerate only notes what it is given."""

    main, started, logged = True, None, None

    def start_tracker(self, project, config, settings):
        self.started, self.logged = (project, settings["mlflow"]), []

    def log(self, scalars, step):
        self.logged.append((scalars, step))


def test_mlflow_gets_the_values_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    library, context, settings = Library(), Context(), recipe.load("digits", ["tracking.project=mine"])
    monkeypatch.setitem(sys.modules, "mlflow", library)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = MLflow(tmp_path, settings, context, "abcd")
    tracker.start(0)
    assert library.uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert context.started == ("mine", {"run_id": None, "run_name": "digits", "tags": {"dnal_dist": "abcd"}})
    assert library.dicts["recipe.yaml"]["name"] == "digits"
    tracker.send("start", {"sites": {"a": 4}}, 0, 0)
    tracker.send("train", {"phase": "pretrain", "loss": 0.5, "step": 3}, 3, 9)
    assert [(scalars["train/loss"], step) for scalars, step in context.logged] == [(0.5, 3)]
    library.runs.append("abcd")
    MLflow(tmp_path, settings, context, "abcd").start(3)
    assert context.started[1]["run_id"] == "id of abcd"


def test_a_missing_package_is_named_where_it_was_asked_for(tmp_path, monkeypatch, capsys):
    """W&B is the default: without it a run warns, and goes on."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = RunLog(tmp_path, recipe.load("digits"), Context())
    log.close()
    assert "W&B did not start; the run goes on without it" in (said := capsys.readouterr().out)
    assert "pip install wandb, or set tracking.tracker=none" in said
    monkeypatch.setattr(values.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"mlflow needs the package mlflow: pip install 'dnal-dist\[mlflow\]'"):
        values.require("mlflow")
