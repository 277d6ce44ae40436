"""The phases of a run, in order. A run that has passed the last one is in "done"."""

from typing import Literal, get_args

Phase = Literal["pretrain", "search", "prune", "finetune", "done"]
PHASES: tuple[Phase, ...] = get_args(Phase)
