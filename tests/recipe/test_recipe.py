"""Recipes: what is read, what is refused and in which words, and that every field is documented."""

import json
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
    "override, told",
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
def test_what_is_wrong_is_told_with_its_key(override, told):
    with pytest.raises(errors.InputError, match=told) as caught:
        recipe.load(DIGITS, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "expected keys"),
        ("- a\n", "expected keys"),
        ("name: [", "not valid YAML"),
        ("name: a\nname: b\n", "'name' is given twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_what_is_no_recipe_is_told_with_its_file(tmp_path, text, told):
    with pytest.raises(errors.InputError, match=rf"r\.yaml.*{told}"):
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
