"""One rule for paths: ~ and $VAR are expanded in recipes, overrides and commands."""

import argparse
import ast
from pathlib import Path

import pytest

from dnal_dist import recipe
from dnal_dist.common.door import argument
from dnal_dist.common.errors import InputError
from dnal_dist.common.paths import expanded
from dnal_dist.data.cache import Cache
from dnal_dist.data.shardlist import expand


def test_home_and_variables_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert expanded("~/x") == f"{tmp_path}/x" and expanded("$SCRATCH/a/${SCRATCH}b") == "/scratch/me/a//scratch/meb"
    assert expanded("a~/x") == "a~/x" and expanded("{000..007}.tar") == "{000..007}.tar"
    assert argument("~/x") == tmp_path / "x"
    monkeypatch.setenv("WITH", "a$b")
    for words in ("$NOT_SET/x", "${NOT_SET}", "~nobody-of-that-name/x", "${SCRATCH:-/tmp}/x", "a$/x", "$$", "$(pwd)/x", "$WITH/x"):
        with pytest.raises(InputError, match="write the path in full"):
            expanded(words)
        with pytest.raises(argparse.ArgumentTypeError):
            argument(words)


def test_every_path_of_a_command_follows_the_rule():
    found, paths = [], ("FILE", "FOLDER", "RUN", "RECIPE|RUN", "PNG")
    for path in [*Path("dnal_dist").rglob("*.py"), *Path("data_tools").glob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            given = {one.arg: ast.unparse(one.value) for one in getattr(call, "keywords", ())}
            if given.get("metavar", "").strip("'") in paths:
                found.append(given.get("type"))
    assert len(found) > 10 and set(found) == {"argument"}


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
    with pytest.raises(InputError, match=r"key 'output': '\$\{SCRATCH:-/tmp\}/x' has a \$ that is neither \$NAME nor"):
        recipe.load("~/r.yaml", ["output=${SCRATCH:-/tmp}/x"])
    with pytest.raises(InputError, match=r"key 'data.val': the variable NOT_SET"):
        expand("x-${NOT_SET}.tar", "data.val")
    for words in ("${BASE:-/data}/x.tar", "$(pwd)/x.tar"):
        with pytest.raises(InputError, match=r"key 'data.val': .* has a \$ that is neither"):
            expand(words, "data.val")
    with pytest.raises(InputError, match=r"key 'data.cache': the variable NOT_SET"):
        Cache(Path("$NOT_SET/x"), 10)


def test_a_variable_may_hold_the_beginning_of_a_url(monkeypatch):
    monkeypatch.setenv("BASE", "https://shards.example/set")
    names, urls = expand("$BASE/{0..1}.tar", "data.train")
    assert names == urls == ["https://shards.example/set/0.tar", "https://shards.example/set/1.tar"]
    monkeypatch.setenv("BASE", "https://me:hunter2@shards.example")
    with pytest.raises(InputError, match=r"key 'data\.train': a https:// URL with a user or password in it") as refused:
        expand("$BASE/x.tar", "data.train")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "words, message",
    [
        ("x-{0..999999999}.tar", "has braces for more than 100,000 shards; correct them"),
        ("x-{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar", "has braces for more than"),
        ("x-{" + "9" * 30 + ".." + "9" * 5000 + "}", "is not a pattern"),
        ("{" * 2000 + "}" * 2000, "has braces for more than"),
        ("x-{0..3.tar", "is not a pattern"),
    ],
    ids=["range", "product", "digits", "deep", "open"],
)
def test_braces_without_bounds_are_refused_at_once(words, message):
    with pytest.raises(InputError, match=f"key 'data.train': .*{message}") as refused:
        expand(words, "data.train")
    assert len(str(refused.value)) < 1000
