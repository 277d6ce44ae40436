"""Sweeps: one recipe, trained once for each combination of values."""

import itertools
import math
import re
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dnal_dist import recipe as recipes
from dnal_dist.common.errors import InputError
from dnal_dist.common.files import read_regular
from dnal_dist.common.paths import expanded
from dnal_dist.recipe import Recipe
from dnal_dist.recipe.schema import Place

# Runs of one sweep; SLURM's arrays hold 1,000 tasks unless the site allows more.
MOST = 1000


# What a pretrain depends on: runs that differ in it cannot share one.
OF_PRETRAIN = ("phases.pretrain", "model", "data", "training")


class Member(NamedTuple):
    """One run of a sweep, or the only one."""

    recipe: Recipe
    overrides: list[str]
    """Of the recipe file."""

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output).absolute()


class Sweep(BaseModel):
    """A file of recipes/sweeps/."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    recipe: str
    """File of the recipe."""
    output: Place
    """Folder of the run folders, each named after its values."""
    vary: dict[str, list[str]] = Field(min_length=1)
    """Keys of the recipe, each with its values; every combination is a run."""
    set: dict[str, str] = {}
    """Keys of the recipe with one value for all runs."""
    share: Literal["pretrain"] | None = None
    """pretrain: one run, OUTPUT/pretrain, takes this phase, and all others begin with its network."""


def load(path: str, overrides: list[str]) -> tuple[Sweep, list[Member], Member | None]:
    """The runs of the sweep in the file at `path`, in the order of its lists, the last one varying fastest, and the run whose
    pretrain they share, if they do. overrides: of all runs. Raises InputError."""
    path = expanded(path, "--sweep: ")
    try:
        # As text: each value becomes an override of the recipe.
        sweep = Sweep.model_validate(yaml.load(read_regular(Path(path), 1 << 16).decode(), yaml.BaseLoader))
    except FileNotFoundError:
        raise InputError(f"{path}: no such sweep; those of the project are in recipes/sweeps/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path}: {key}: {first['msg'].lower()}; keys are {', '.join(Sweep.model_fields)}") from None
    for key, values in sweep.vary.items():
        if not values or len({*values}) < len(values):
            raise InputError(f"{path}: key 'vary.{key}': expected a list of different values, such as [5e-5, 1e-4]")
    if (runs := math.prod(map(len, sweep.vary.values()))) > MOST:
        raise InputError(f"{path}: key 'vary': {runs:,} runs, expected at most {MOST:,}; divide it into several sweeps")
    if output := [word for word in [*overrides, *sweep.vary, *sweep.set] if word.partition("=")[0] == "output"]:
        raise InputError(f"{output[0]}: each run of a sweep has a folder of its own in {sweep.output} (key 'output' of {path})")
    common = [f"{key}={value}" for key, value in sweep.set.items()] + overrides
    begin, pretrain = [], None
    if sweep.share:
        if own := [key for key in sweep.vary if any(key == part or key.startswith(f"{part}.") for part in OF_PRETRAIN)]:
            raise InputError(f"{path}: key 'vary.{own[0]}': runs that differ in it have no pretrain to share; remove 'share'")
        changes = [*common, f"output={Path(sweep.output, 'pretrain')}"]
        pretrain = Member(recipes.load(sweep.recipe, changes), changes)
        # The weights come from there alone, also where the recipe begins with published ones.
        begin = [f"model.init_from={pretrain.folder}", "model.pretrained=false", "phases.pretrain.epochs=0"]
    members = []
    for values in itertools.product(*sweep.vary.values()):
        varied = [f"{key}={value}" for key, value in zip(sweep.vary, values, strict=True)]
        changes = [*common, *begin, *varied, f"output={Path(sweep.output, _name(varied))}"]
        members.append(Member(recipes.load(sweep.recipe, changes), changes))
    return sweep, members, pretrain


def _name(varied: list[str]) -> str:
    """penalty_weight=5e-5,seed=1"""
    parts = (f"{key.rpartition('.')[2]}={value}" for key, _, value in (word.partition("=") for word in varied))
    return re.sub(r"[^\w.,=+-]", "_", ",".join(parts))
