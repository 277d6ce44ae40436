"""Checks before a run trains; each raises InputError with the key and the remedy."""

import itertools
from collections.abc import Sequence

import torch

from dnal_dist import nets, recipe
from dnal_dist.common.errors import InputError
from dnal_dist.data.classes import refuse_conflicts, unlike
from dnal_dist.data.shards import Shards
from dnal_dist.distributed.context import Context
from dnal_dist.training.run import Run


def check_same_shards(run: Run, before: dict[str, str], allowed: Sequence[str]) -> None:
    """The order of samples continues only over the shards that the run began with."""
    for key, digest in run.state.shards.items():
        if before.get(key, digest) != digest and not {key, "data"} & set(allowed):
            raise InputError(
                f"key '{key}': the shards are not those that the run began with; put those back, or remove the folder to "
                f"start again (outside of SLURM: --allow-changed {key} or --overwrite)"
            )


def check_phase_length(run: Run) -> None:
    """A phase that was shortened must still contain the present step."""
    state = run.state
    phase = getattr(run.recipe.phases, state.phase, None)
    if phase is not None and state.step > (total := phase.iterations(run.train.steps_per_epoch)):
        raise InputError(
            f"key 'phases.{state.phase}': the run has taken {state.step} of its iterations already, so {total} are too few; "
            "make it longer"
        )


def check_shards_agree(shards: Shards, context: Context) -> None:
    """All processes must find the shards of the main process; raises on all of them."""
    first, *others = context.gather([shards.fingerprints()])
    for rank, other in enumerate(others, 1):
        if other != first:
            one, two = next((a, b) for a, b in itertools.zip_longest(first, other, fillvalue="nothing more") if a != b)
            raise InputError(
                f"key '{shards.key}': process {rank} finds other shards than process 0 ({two}; not {one}); "
                f"copy the same files, with their index, to every machine"
            )


def class_warnings(splits: Sequence[Shards], classes: int) -> list[str]:
    """The warning of a network with more classes than the indices of all splits name. Raises InputError for one with fewer, and if
    two indices number the classes differently."""
    refuse_conflicts({where: names for shards in splits for where, names in shards.classes.items()})
    named = {shards.key: shards.class_names() for shards in splits}
    found = unlike(named, classes)
    if max(named.values()) > classes:
        raise InputError(found)
    return [found] if found else []


def check_search_length(settings: recipe.Recipe, per_epoch: int) -> None:
    """The search must contain an architecture step."""
    if not settings.searches:
        return
    phase = settings.phases.search
    if phase.iterations(per_epoch) <= phase.weight_steps:
        raise InputError(
            f"key 'phases.search.weight_steps': a cycle begins with {phase.weight_steps} weight steps, but the search has only "
            f"{phase.iterations(per_epoch)} iterations, so no gate would ever move; lower it or lengthen the search"
        )


def check_images(network: nets.GatedNetwork, data: recipe.Data, micro_batch: int) -> None:
    """Images of the recipe's size, and so few of them in a micro-batch, must pass through `network`."""
    nets.require_image_size(network, data.image_size)
    if micro_batch > 1:
        return
    with torch.no_grad(), nets.frozen_statistics(network.train()):
        try:
            network(torch.zeros(1, 3, data.image_size, data.image_size))
        except ValueError as error:
            raise InputError(
                f"key 'data.global_batch': {data.global_batch} leaves one image to a process at a time, too few for BatchNorm "
                f"({error}); raise it, or key 'data.per_device_batch_limit' if that is what divides it"
            ) from None
