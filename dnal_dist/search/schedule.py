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


def architecture_steps(steps: int, weight: int, architecture: int) -> int:
    """Number of architecture steps among the search's first `steps` iterations."""
    cycles, rest = divmod(steps, weight + architecture)
    return cycles * architecture + max(0, rest - weight)


def learning_rate_at(phase, step: int, per_epoch: int) -> float:
    """Learning rate of a recipe's `phase` after `step` iterations of it, `per_epoch` of which are an epoch."""
    unit, duration = (1, phase.steps) if phase.epochs is None else (per_epoch, phase.epochs)
    rate = learning_rate(phase.schedule, phase.optimizer.lr, step / unit, duration)
    warmup = phase.schedule.warmup * unit
    # The first step is no step at a rate of 0.
    return rate if step + 1 >= warmup else rate * (step + 1) / warmup


def delta_at(phase, architecture, step: int, per_epoch: int) -> float:
    """Hardness of the gates after `step` iterations of a recipe's search `phase`: it grows once an epoch, or once a step where the
    phase's duration is in steps. `architecture` is the recipe's part."""
    k, count = (step, phase.steps) if phase.epochs is None else (step // per_epoch, int(phase.epochs))
    return delta(architecture.delta_start, architecture.delta_final, min(k, count - 1), count)
