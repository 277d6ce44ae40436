"""Which runs are seeds of one setting: whatever has a say in the result, of the recipe and of `start`'s records. No torch."""

import json
from itertools import pairwise

from dnal_dist.report import published
from dnal_dist.report.records import Run

# What has a say and is in no recipe: the launcher's, and how much the shards hold that a recipe names.
FACTS = ("precision", "train_samples", "val_samples")
# The key under which settings hold the changes that they went through.
CHANGED = "changed"


def settings(run: Run) -> dict[str, object]:
    """What has a say in a run's result: the keys of its recipe, flat, with today's defaults for those that an earlier release
    lacked, the FACTS of its last start, and under CHANGED its `changes`, if any. Empty without a recipe."""
    from pydantic import ValidationError

    from dnal_dist.recipe import Recipe, flat, free_keys, is_free

    if not run.recipe:
        return {}
    try:
        tree = Recipe.model_validate(run.recipe).model_dump(mode="json")
    except ValidationError:
        tree = run.recipe
    free = free_keys("setting")
    found = {key: value for key, value in flat(tree).items() if not is_free(key, free)}
    start = run.last("start")
    found |= {key: start[key] for key in FACTS if key in start}
    return found | ({CHANGED: "; ".join(changed)} if (changed := changes(run)) else {})


def changes(run: Run) -> list[str]:
    """What of that became another when the run went on, in words: its result is that of no setting."""
    from dnal_dist.recipe import free_keys, is_free

    starts, found, free = run.of("start"), [], free_keys("setting")
    for before, start in pairwise(starts):
        found += [(key, before[key], start[key]) for key in FACTS if key in before and key in start]
    for start in starts:
        found += [(key, *change) for key, change in start.get("changed", {}).items() if not is_free(key, free)]
    return [f"{key}: {value_text(old)} -> {value_text(new)}" for key, old, new in found if old != new]


def setting_of(run: Run) -> str:
    """Equal for runs that are seeds of one setting, and for no others. Without its recipe, nothing shows that a run is like
    another one; nor is one that was changed on the way."""
    own = settings(run)
    return json.dumps(own, sort_keys=True) if own and CHANGED not in own else str(run.folder.resolve())


def value_text(value: object) -> str:
    """A value of a recipe in few letters: 1e-4."""
    if isinstance(value, float):
        return published.weight_text(value)
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def in_order(value: object) -> tuple:
    """Sorts values of a recipe: none, numbers as numbers, words, all else."""
    if value is None:
        return (0,)
    if isinstance(value, int | float):
        return 1, value
    return (2, value) if isinstance(value, str) else (3, json.dumps(value, sort_keys=True))
