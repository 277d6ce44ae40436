"""Recipes: what is read, what is refused and in which words, and that every field is documented."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from dnal_dist import recipe
from dnal_dist.common import errors

DIGITS = Path("recipes/digits.yaml")


def load(tmp_path, text: str, *overrides: str) -> recipe.Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return recipe.load(path, overrides)


def test_resolved_recipe_reads_back_as_itself(tmp_path):
    one = recipe.load(DIGITS, ["seed=3", "phases.search.weight_steps=0"])
    assert load(tmp_path, recipe.dump(one)) == one


def test_overrides_take_yaml_values_and_win():
    one = recipe.load(DIGITS, ["architecture.penalty_weight=2e-2", "seed=3", "data.mean=[0.1, 0.2, 0.3]", "name=x"])
    assert (one.architecture.penalty_weight, one.seed, one.data.mean, one.name) == (0.02, 3, (0.1, 0.2, 0.3), "x")


def test_a_duration_in_the_other_unit_replaces_the_recipes():
    one = recipe.load(DIGITS, ["phases.search.steps=6"])
    assert (one.phases.search.steps, one.phases.search.epochs) == (6, None)


def test_durations_in_iterations():
    phase = recipe.Phase(epochs=1.5, optimizer=recipe.SGD(lr=0.1))
    assert phase.iterations(10) == 15
    assert recipe.Phase(steps=7, optimizer=recipe.SGD(lr=0.1)).iterations(10) == 7


def test_numbers_such_as_1e_4_are_numbers(tmp_path):
    assert load(tmp_path, DIGITS.read_text(), "architecture.penalty_weight=1e-4").architecture.penalty_weight == 1e-4


def test_recipes_are_frozen():
    with pytest.raises(ValidationError):
        recipe.load(DIGITS).seed = 1


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.globl_batch=3", r"unknown key 'data\.globl_batch' \(did you mean 'global_batch'\?\)"),
        ("phases.search.schedule={kind: cosine, horizn: 3}", r"unknown key 'phases\.search\.schedule\.horizn'"),
        ("phases.pretrain.epochs=-1", r"'phases\.pretrain\.epochs'.*greater than or equal to 0.*-1"),
        ("seed=one", r"'seed'.*integer.*'one'"),
        ("seed=yes", r"'seed'.*integer.*True"),
        ("architecture.penalty_weight=.inf", r"'architecture\.penalty_weight'.*finite"),
        ("architecture.penalty=l1", r"'architecture\.penalty'.*'sigmoid', 'scaled_sigmoid', 'expected_macs' or 'root_macs'"),
        ("phases.search.epochs=1.5", r"'phases\.search'.*whole"),
        ("data.augmentation={kind: resized_crop, scale: [0.9, 0.1]}", r"'data\.augmentation'.*smallest"),
        ("phases.pretrain={optimizer: {lr: 0.1}}", r"'phases\.pretrain'.*exactly one of 'epochs' and 'steps'"),
        ("phases.pretrain={epochs: 1, steps: 1, optimizer: {lr: 0.1}}", r"exactly one"),
        ("model={}", r"'model\.name' is missing"),
        ("data.resize=7", r"'data'.*resize \(7\) must be at least image_size \(8\)"),
        ("architecture.delta_final=0.1", r"'architecture'.*delta_final must be at least delta_start"),
        ("seed.x=1", r"'seed' is a value"),
        ("seed", r"expected key=value"),
        ("seed=[", r"not a YAML value"),
    ],
)
def test_a_wrong_value_is_reported_with_its_key(override, message):
    with pytest.raises(errors.InputError, match=message) as caught:
        recipe.load(DIGITS, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected keys"),
        ("- a\n", "expected keys"),
        ("name: [", "not valid YAML"),
        ("name: a\nname: b\n", "'name' is given twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_an_invalid_recipe_is_reported_with_its_file(tmp_path, text, message):
    with pytest.raises(errors.InputError, match=rf"r\.yaml.*{message}"):
        load(tmp_path, text)


def test_every_field_is_documented_in_the_schema():
    schema = recipe.Recipe.model_json_schema()
    for name, part in {"Recipe": schema, **schema["$defs"]}.items():
        for key, field in part["properties"].items():
            assert len(field.get("description", "")) > 10, f"{name}.{key}"


def test_schema_command_writes_a_schema_that_the_recipes_meet():
    found = subprocess.run([sys.executable, "-m", "dnal_dist.recipe", "--schema"], capture_output=True, text=True, check=True)
    schema = json.loads(found.stdout)
    assert schema["additionalProperties"] is False
    keys = set(yaml.safe_load(DIGITS.read_text()))
    assert set(schema["required"]) <= keys <= set(schema["properties"])


def test_recipe_imports_nothing_heavy():
    code = "import sys, dnal_dist.recipe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


BOMB = "x0: &x0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: 2020-99-99", r"month must be in 1\.\.12.* line 1"),
        ("seed: 0x_", r"invalid literal.* line 1"),
        (f"seed: {'9' * 5000}", "more than 18 digits"),
        (f"seed: {'9' * 30}", "more than 18 digits"),
        ('seed: !!int "abc"', "not a value"),
        ("seed: !!map abc", "expected a mapping"),
        ("seed: !!timestamp abc", "not a value"),
        ("seed: &a [*a]", "more than 4000 values"),
        (f"{BOMB}name: *x9", "more than 4000 values"),
        ("".join(f"key{number}: 1\n" for number in range(20_000)), "expected at most 32,768; it is no such file"),
        ("".join(f"k{number}: 1\n" for number in range(1500)), r"key 'name' is missing; .*; and 15\d\d more"),
        ("[" * 20_000, "nested more than 20 deep"),
        ("- " * 10_000, "nested too deep"),
        ("name: [[[[[[[[1]]]]]]]]", r"key 'name'.*, found \[\[\[\.\.\.\]\]\]"),
        (f"name: {'x' * 10_000}\nseed: {'y' * 10_000}", r"key 'seed': .*, found 'y+\.\.\.y+'"),
        ('name: "nice\\ntouch PWNED\\n# "', r"key 'name': expected one line without control characters"),
        ("output: https://user:hunter-2@host/x", r"key 'output': an address with a user or password in it; remove that"),
        ("data: {train: ['s3://b/x?sig=hunter-2=']}", r"'data\.train': input should be a valid string"),
        ("data: {train: 's3://b/x?sig=hunter-2='}", r"key 'data\.train': an address with a query string in it"),
    ],
    ids=lambda _: "",
)
def test_whatever_a_file_holds_is_reported_in_a_short_line(tmp_path, text, message):
    with pytest.raises(errors.InputError, match=message) as caught:
        load(tmp_path, text)
    assert len(str(caught.value)) < 2000 and "hunter" not in str(caught.value) and "\n" not in str(caught.value)


def test_no_text_breaks_the_reader(tmp_path):
    """Recipes with random changes of characters, lines and values are read or refused, and never anything else."""
    draw, whole, seen = random.Random(7), DIGITS.read_text(), set()
    pieces = [
        "&a ",
        "*a",
        "!!int ",
        "!!binary ",
        "? ",
        ": ",
        "- ",
        "[",
        "{",
        "}",
        "'",
        '"',
        "|\n",
        "<<: ",
        "\t",
        "\0",
        "0x",
        "1e",
        "~",
        "\u2028",
    ]
    for _ in range(300):
        text = whole
        for _ in range(draw.randint(1, 6)):
            at, to = draw.randrange(len(text)), draw.randrange(30)
            text = text[:at] + draw.choice([*pieces, "", text[at : at + to] * 3]) + text[at + draw.randrange(4) :]
        try:
            seen.add(type(load(tmp_path, text)))
        except errors.InputError as error:
            seen.add(type(error))
            assert len(str(error)) < 4000
    assert seen == {recipe.Recipe, errors.InputError}
