"""The names of the classes in the indices of shards, and whether all of them number the classes alike."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from dnal_dist.common.errors import InputError
from dnal_dist.data.shardlist import Url, index_content

Names = Mapping[str, list[str]]
"""Names of the classes, by the index that has them."""


def class_names(folder: Path | Url) -> list[str]:
    """The names of the classes that folder/index.json has; [] if it or they are not there."""
    try:
        names = index_content(folder).get("classes")
    except (OSError, ValueError, AttributeError, RecursionError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def class_numbers(names: list[str]) -> dict[str, int]:
    """The numbers of the classes by name, without names that two classes have."""
    counts = Counter(names)
    return {name: number for number, name in enumerate(names) if counts[name] == 1}


def are_numbers(names: list[str]) -> bool:
    """Whether these names of classes are only their numbers."""
    return names == list(map(str, range(len(names))))


def conflicts(names: Names) -> Iterator[tuple[str, str]]:
    """Indices whose names of the classes differ from those of the first index that has names; and how. Names that are only their
    numbers say nothing, unless another index has numbers in other places, as those of digits may be."""
    named = {where: found for where, found in names.items() if not are_numbers(found)}
    if any(name.strip().isdigit() for found in named.values() for name in found):
        named = {where: found for where, found in names.items() if found}
    first, *others = named.items() or [("", [])]
    for where, found in others:
        number = next((i for i, (a, b) in enumerate(zip(first[1], found, strict=False)) if a != b), None)
        if number is not None:
            yield where, f"calls class {number} {found[number]!r}, {first[0]} calls it {first[1][number]!r}"
        elif len(found) != len(first[1]):
            yield where, f"names {len(found)} classes, {first[0]} names {len(first[1])}"


def unlike(named: Mapping[str, int], classes: int) -> str:
    """What is wrong if the indices, of which some name only the classes that they have, name together another number of classes
    than a network has; "" if nothing is. named: the number that each split's indices name, by its key."""
    key = max(named, key=named.get)
    if named[key] in (0, classes):
        return ""
    return (
        f"the index of {key} names {named[key]} classes, the network has {classes}"
        f"{', some of which are never right' if named[key] < classes else ''}; set 'model.num_classes' to {named[key]}, or correct "
        "the index"
    )


def refuse_conflicts(names: Names) -> None:
    """Raise InputError if two of these indices number the classes differently: the labels of one would be wrong."""
    for where, what in conflicts(names):
        raise InputError(f"{where}: {what}; a class has one number in all shards: make them with the classes in one order")
