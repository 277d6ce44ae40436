"""Schedules as pure functions of position: the learning rate, delta, and which group steps at an iteration."""

import math


def learning_rate(schedule, base: float, position: float, duration: float) -> float:
    """Learning rate at `position` of a phase.

    `position` and `duration` are counted in the unit of the phase's own duration (epochs, fractional, or steps). `schedule` is a
    recipe's schedule: constant; steps (times `factor` at each milestone reached); cosine,
    `base * 0.5 * (1 + cos(pi * (offset + position) / horizon))`, whose horizon defaults to the phase's end.
    """
    if schedule.kind == "constant":
        return base
    if schedule.kind == "steps":
        return base * schedule.factor ** sum(position >= milestone for milestone in schedule.milestones)
    horizon = schedule.horizon or schedule.offset + duration
    # Beyond its horizon a cosine would rise again, so it rests at its end.
    return base * 0.5 * (1 + math.cos(math.pi * min(1.0, (schedule.offset + position) / horizon)))


def delta(start: float, final: float, k: int, count: int) -> float:
    """Hardness of the gates in the k-th (from 0) of `count` equal parts of the search: geometric, reaching `final` in the last one.

    Source: section on optimisation of arXiv 2103.02126; one part is an epoch there.
    """
    return start * (final / start) ** ((k + 1) / count)


def is_architecture_step(step: int, weight_steps: int, architecture_steps: int) -> bool:
    """Whether the search's iteration `step` (from 0) steps the architecture: each cycle steps the weights first."""
    return step % (weight_steps + architecture_steps) >= weight_steps
