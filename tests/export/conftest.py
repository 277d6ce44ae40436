"""An export of the finished short run, and what loads it without this project."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exported(finished, once):
    """The run folder with its export, to be looked at only."""

    def make(path: Path) -> None:
        from dnal_dist.export.command import Options, export

        shutil.copytree(finished, path)
        export(path, Options(hub=path / "hub"))

    return once("exported", make)


@pytest.fixture
def clean_room(tmp_path):
    """Runs a program where nothing but the packages of `allowed` can be imported beside Python's own: other finders are gone, and
    the working directory is an empty folder."""

    def run(program: str, *allowed: str) -> str:
        head = f"""
import importlib.machinery, sys
class Only(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        first = name.partition(".")[0]
        if first not in {set(allowed) | set(sys.stdlib_module_names)!r} and not first.startswith("_sysconfigdata"):
            return None
        return super().find_spec(name, path, target)
sys.meta_path = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter, Only]
for name in ("dnal_dist", "data_tools"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " can be imported")
"""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-B", "-c", head + program]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
