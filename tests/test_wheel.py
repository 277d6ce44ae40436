"""What an installed wheel does without a checkout."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from dnal_dist.__main__ import COMMANDS

PACKAGES = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel puts into site-packages."""
    pytest.importorskip("setuptools")
    made = tmp_path_factory.mktemp("wheel")
    # A copy, since setuptools builds inside the folder it is given.
    files = subprocess.run(
        ["git", "ls-files", "--others", "--cached", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    for name in files.stdout.split("\n"):
        if name and not name.startswith("tests/") and Path(name).is_file():
            (made / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            (made / "checkout" / name).write_bytes(Path(name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(made), str(made / "checkout")], check=True, timeout=120)
    (wheel,) = made.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(made / "site")
    return made / "site"


@pytest.fixture
def dnal(installed, tmp_path):
    def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "dnal_dist", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=check, timeout=200)

    return run


def test_every_package_of_the_checkout_is_in_the_wheel():
    folders = {path.parent for root in ("dnal_dist", "data_tools") for path in Path(root).rglob("__init__.py")}
    assert set(PACKAGES) == {".".join(folder.parts) for folder in folders} | {"dnal_dist.recipes", "dnal_dist.slurm"}


def test_every_file_of_the_packages_is_in_the_wheel(installed):
    kept = subprocess.run(
        ["git", "ls-files", "dnal_dist", "data_tools", "recipes", "slurm"], capture_output=True, text=True, check=True
    )
    for name in kept.stdout.split():
        place = name if name.startswith(("dnal_dist", "data_tools")) else f"dnal_dist/{name}"
        assert (installed / place).is_file() or not Path(name).exists(), name


def test_a_packaged_recipe_is_trained_by_its_name(dnal, digits, tmp_path):
    settings = [f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", "architecture.recalibration_batches=1"]
    settings += [f"phases.{name}.steps=2" for name in ("pretrain", "search", "finetune")]
    dnal("train", "digits", *settings, "tracking.tracker=none", "tracking.plots=false", "output=run")
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "compact" / "weights.safetensors").is_file()


def test_a_job_is_submitted_without_a_checkout(dnal, installed):
    script = dnal("submit", "digits", "--gpus-per-node", "0", "--time", "01:00:00", "--dry-run").stdout
    assert f"--config_file {installed}/dnal_dist/recipes/accelerate/ddp.yaml" in script


def test_recipes_sweeps_and_accelerate_configs_can_be_copied(dnal, tmp_path):
    dnal("recipe", "--copy", "own")
    for name in ("digits.yaml", "sweeps/digits_lambda.yaml", "accelerate/zero3.yaml"):
        assert (tmp_path / "own" / name).read_bytes() == Path("recipes", name).read_bytes()
    again = dnal("recipe", "--copy", "own", check=False)
    assert again.returncode == 2 and again.stderr == "error: --copy own: File exists; name a new folder\n"


def test_a_recipe_in_the_working_directory_wins(dnal, tmp_path):
    (tmp_path / "digits.yaml").write_text(Path("recipes/digits.yaml").read_text().replace("seed: 0", "seed: 5"))
    assert "seed: 5\n" in dnal("recipe", "digits").stdout
    assert "seed: 0\n" in dnal("recipe", "recipes/digits.yaml").stdout


def test_an_unknown_recipe_is_refused_with_the_names(dnal):
    refused = dnal("recipe", "digit", check=False)
    names = ", ".join(sorted(path.stem for path in Path("recipes").glob("*.yaml")))
    assert refused.returncode == 2
    assert refused.stderr == f"error: digit: no such recipe; give a file, or the name of a packaged one: {names}\n"


def test_the_console_script_lists_its_commands(dnal):
    listed = dnal("--help").stdout
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    unknown = dnal("trian", check=False)
    assert unknown.returncode == 2 and unknown.stderr.startswith("error: no command is called 'trian'; there are train, ")
