"""Recipes from Python: dnal_dist.train_recipe."""

import subprocess
import sys

import pytest
import torch
from runs import SHORT, arguments, records

import dnal_dist
from dnal_dist import compact


def test_the_result_is_the_run_s_own(digits, tmp_path):
    path, *overrides = arguments(digits, tmp_path / "run", *SHORT)
    result = dnal_dist.train_recipe(path, overrides)
    assert result.folder == tmp_path / "run"
    assert result.accuracy == pytest.approx(records(result.folder, "eval")[-1]["accuracy"])
    (prune,) = records(result.folder, "prune")
    assert result.cost._asdict() == prune["compact"]["exact"]
    images = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(result.network(images), compact.load(result.folder / "compact").eval()(images))
    # A finished run is returned, not trained again.
    count = len(records(result.folder))
    again = dnal_dist.train_recipe(path, overrides)
    assert (again.accuracy, again.cost) == (result.accuracy, result.cost) and len(records(result.folder, "train")) < count


def test_wrong_input_is_a_value_error_that_names_the_key(digits, tmp_path):
    path, *overrides = arguments(digits, tmp_path / "run", *SHORT, "data.global_batch=0")
    with pytest.raises(ValueError, match=r"data\.global_batch"):
        dnal_dist.train_recipe(path, overrides)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, dnal_dist; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
