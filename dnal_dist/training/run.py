"""A run: everything that it works with, and where it stands."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

from dnal_dist.checkpoint.format import Gathered, Spent
from dnal_dist.checkpoint.writer import Writer
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.receipts import Receipt
from dnal_dist.distributed.context import Context
from dnal_dist.nets import GatedNetwork
from dnal_dist.recipe import Recipe
from dnal_dist.search.architecture import Architecture
from dnal_dist.search.selection import Budget
from dnal_dist.tracking.run_log import RunLog
from dnal_dist.training.stopping import Edges


@dataclass
class Run:
    """Everything a run works with, and where it stands."""

    recipe: Recipe
    folder: Path
    context: Context
    log: RunLog
    train: Stream
    val: Stream
    supernet: GatedNetwork
    """The gated network; on the CPU once it is pruned."""
    architecture: Architecture
    writer: Writer
    edges: Edges
    lock: FileLock | None
    """On the run folder; the main process's."""
    budget: Budget | None
    """The cost that the recipe asks for, if it does."""
    shards: dict[str, str]
    """What the shards of each set are, as a digest: the order of samples means nothing over others."""
    resumed: bool = False
    """Whether it goes on from a checkpoint."""
    phase: str = "pretrain"
    step: int = 0
    """Iterations of the phase that lie behind."""
    global_step: int = 0
    """Iterations of the run that lie behind; also the position in the stream of batches."""
    evaluated: int = -1
    """The global step of the last evaluation."""
    accuracy: float | None = None
    """What it found, for as long as the run stands there."""
    penalty_rests: bool = False
    """The collapse guard has switched the penalty off."""
    penalty_weight: float | None = None
    """Of the last architecture step of a search that is after a budget, and the state of the loop that drives it."""
    penalty_lag: float = 0.0
    momentum: dict[str, Tensor] = field(default_factory=dict)
    """Of the weights, by name, to start the next optimiser with."""
    skipped: set[str] = field(default_factory=set)
    """Samples that could not be used and have been named."""
    receipt: Receipt = field(default_factory=Receipt)
    """Of the pass over the training set that is under way."""
    meter: tuple[Gathered, Tensor, bool] | None = None
    """What the meter of the phase begins with, on a resume in its midst: with this process's sums, and whether its processes and
    backend are the same."""
    mask: str | None = None
    """The keep mask as cost.pack writes it, once there is one."""
    small: nn.Module | None = None
    """The compact network, once there is one."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each phase so far."""
    spent: dict[str, Spent] = field(default_factory=dict)
    """What else each phase took so far."""

    def __post_init__(self):
        settings = self.recipe.architecture.optimizer
        self.architecture_optimizer = torch.optim.SGD(
            self.architecture.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
        )

    def close(self) -> None:
        """Let go of the folder, when the checkpoint that is being written is there."""
        self.writer.close()
        if self.lock is not None:
            self.lock.release()

    @property
    def network(self) -> nn.Module:
        """The bare network that trains now."""
        return self.supernet if self.small is None else self.small
