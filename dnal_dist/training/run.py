"""A run: the state that its checkpoints hold, and what it works with."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from dnal_dist.checkpoint.format import PendingMetrics, RunState
from dnal_dist.checkpoint.writer import Writer
from dnal_dist.common.lock import Lock
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.receipts import Receipt
from dnal_dist.distributed.context import Context
from dnal_dist.distributed.optimizers import SGD
from dnal_dist.nets import GatedNetwork
from dnal_dist.recipe import Recipe
from dnal_dist.search.architecture import Architecture
from dnal_dist.search.budgets import Budget
from dnal_dist.search.taylor import Squares
from dnal_dist.tracking.run_log import RunLog
from dnal_dist.training.finished import Finished
from dnal_dist.training.profiling import Breakdown
from dnal_dist.training.stopping import StopPoll


@dataclass
class Run:
    """Where a run stands (`state`), and its collaborators."""

    recipe: Recipe
    folder: Path
    context: Context
    state: RunState
    log: RunLog
    train: Stream
    val: Stream
    supernet: GatedNetwork
    """The gated network; on the CPU once it is pruned."""
    architecture: Architecture
    budget: Budget | None
    """The cost range that the recipe's target allows; None if the recipe sets a penalty weight."""
    writer: Writer
    stops: StopPoll
    lock: Lock | None
    """Lock on the run folder, held by the main process."""
    resumed: bool = False
    """Whether the run started from a checkpoint."""
    compact: nn.Module | None = None
    """The compact network, once the supernet is pruned."""
    given: Finished | None = None
    """In a run without a search, the compact network that it begins with."""
    teacher: nn.Module | None = None
    """The network that the recipe distils from: a given one, or, from the search on, the own one as pretrain left it."""
    momentum: dict[str, Tensor] = field(default_factory=dict)
    """Momentum of the weights by name, for the next optimiser."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """Moving average of the weights by name, for the next optimiser of a resumed phase that keeps one; likewise while a checkpoint
    is taken."""
    average_statistics: Tensor | None = None
    """This process's running statistics of that average, flat."""
    receipt: Receipt = field(default_factory=Receipt)
    """Receipt of the pass over the training set that is under way."""
    signal: Tensor | None = None
    """Sums of the gates' gradients over the first architecture steps of the search; see signal.py."""
    pending: tuple[PendingMetrics, Tensor, bool] | None = None
    """After a resume within a phase: its metrics since the last record, this process's sums, and whether processes and backend are
    the same as before."""
    breakdown: Breakdown = field(default_factory=Breakdown)
    """Time of the present phase by part."""

    def __post_init__(self):
        self.log.global_step = self.state.global_step
        settings = self.recipe.architecture.optimizer
        if self.architecture.hard:
            self.architecture_optimizer = Squares(self.architecture)
            return
        self.architecture_optimizer = SGD(
            self.architecture.parameters(),
            settings.lr,
            settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )

    @property
    def network(self) -> nn.Module:
        """The bare network that trains now."""
        return self.supernet if self.compact is None else self.compact

    @property
    def local_batch(self) -> int:
        """Images of one step in this process."""
        return self.recipe.data.global_batch // self.context.world_size

    def advance(self) -> None:
        """Count one iteration."""
        self.state.step += 1
        self.state.global_step += 1
        self.state.accuracy = None
        self.log.global_step = self.state.global_step

    def close(self) -> None:
        """Wait for the checkpoint that is being written, then release the folder."""
        self.writer.close()
        if self.lock is not None:
            self.lock.release()
