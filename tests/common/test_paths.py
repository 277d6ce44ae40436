"""One rule for paths: ~ and $VAR are expanded in recipes, overrides and commands."""

import argparse
from pathlib import Path

import pytest

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.common.paths import argument, expanded
from dnal_dist.data.shardlist import expand


def test_home_and_variables_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert expanded("~/x") == f"{tmp_path}/x" and expanded("$SCRATCH/a/${SCRATCH}b") == "/scratch/me/a//scratch/meb"
    assert expanded("a~/x") == "a~/x" and expanded("{000..007}.tar") == "{000..007}.tar"
    assert argument("~/x") == tmp_path / "x"
    for words in ("$NOT_SET/x", "${NOT_SET}", "~nobody-of-that-name/x"):
        with pytest.raises(ValueError, match="write the path in full"):
            expanded(words)
        with pytest.raises(argparse.ArgumentTypeError):
            argument(words)


def test_a_recipe_follows_the_rule(monkeypatch, tmp_path):
    home = tmp_path / "a home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "r.yaml").write_text(Path("recipes/digits.yaml").read_text())
    (home / "x.tar").touch()
    one = recipe.load("~/r.yaml", ["output=~/run", "model.init_from=$HOME/w.safetensors", "data.train=~/x.tar $HOME/*.tar"])
    assert (one.output, one.model.init_from) == (f"{home}/run", f"{home}/w.safetensors")
    # Shards may lie elsewhere on each machine, so theirs are expanded when they are looked for.
    with pytest.raises(InputError, match="named twice"):
        expand(one.data.train, "data.train")
    with pytest.raises(InputError, match=r"key 'output': the variable NOT_SET in '\$NOT_SET/x' is not set"):
        recipe.load("~/r.yaml", ["output=$NOT_SET/x"])
    with pytest.raises(InputError, match=r"key 'data.val': the variable NOT_SET"):
        expand("x-${NOT_SET}.tar", "data.val")
