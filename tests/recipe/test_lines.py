"""No text of a recipe, wherever it stands, has a line break or a password in it: it reaches scripts, terminals and trackers."""

import json
import typing
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from dnal_dist import recipe
from dnal_dist.common.errors import InputError

SECRET = "hunter2"
TEXTS = ("a\ntouch PWNED", "\x1b[31m", f"https://me:{SECRET}@host/x.tar")


def keys(section: type[BaseModel] = recipe.Recipe, head: str = "") -> Iterator[str]:
    """Dotted keys of all that a recipe may hold, but for the sections themselves."""
    for name, field in section.model_fields.items():
        annotations = [field.annotation, *typing.get_args(field.annotation)]
        sections = [one for one in annotations if isinstance(one, type) and issubclass(one, BaseModel)]
        for inner in sections:
            yield from keys(inner, f"{head}{name}.")
        if not sections:
            yield f"{head}{name}"


def test_every_key_is_met():
    found = set(keys())
    assert {"name", "model.arguments", "model.ignore", "data.image", "architecture.target.macs", "tracking.project"} <= found
    assert "phases.search.schedule.milestones" in found


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_no_key_takes_such_a_text(text):
    for key in keys():
        for value in (text, {"a": [1, [text]]}):
            with pytest.raises(InputError) as refused:
                recipe.load("recipes/digits.yaml", [f"{key}={json.dumps(value)}"])
            message = str(refused.value)
            assert message.isprintable() and SECRET not in message, (key, value)


def test_arguments_of_a_network_may_be_nested():
    given = ["model.arguments={stem: wide, depths: [1, [2, x]], drop: 0.5, bias: null}", "model.ignore=[layer1.0.conv2]"]
    assert recipe.load("recipes/digits.yaml", given).model.arguments["depths"] == [1, [2, "x"]]
