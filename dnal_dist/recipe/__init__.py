"""Recipes: what a run does, as pydantic models."""

from dnal_dist.recipe.learning import (
    SGD,
    ArchitectureSettings,
    Constant,
    Cosine,
    Distillation,
    Phase,
    Phases,
    Pretrain,
    SearchPhase,
    Steps,
    Target,
    amount,
)  # fmt: skip
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
)  # fmt: skip

__all__ = [
    "SGD", "ArchitectureSettings", "Augmentation", "Checkpoints", "Constant", "Cosine", "Data", "Distillation", "Keep",
    "Network", "Phase", "Phases", "Pretrain", "Recipe", "SearchPhase", "Steps", "Target", "Tracking", "Training", "amount",
    "dump", "faults", "flat", "free_keys", "is_free", "load",
]  # fmt: skip
