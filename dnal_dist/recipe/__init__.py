"""Recipes: what a run does, as pydantic models. Other rooms take these names from here."""
# ruff: noqa: F401

from dnal_dist.recipe.learning import (
    SGD,
    ArchitectureSettings,
    Constant,
    Cosine,
    Distillation,
    Phase,
    Phases,
    SearchPhase,
    Steps,
    Target,
    amount,
    duration,
)
from dnal_dist.recipe.loading import dump, faults, load
from dnal_dist.recipe.schema import (
    Augmentation,
    Checkpoints,
    Data,
    Keep,
    Network,
    Recipe,
    Tracking,
    Training,
    flat,
    free_keys,
    is_free,
)
