"""What the architecture steps of a search are pushed with."""

import torch

from dnal_dist.nets import cost
from dnal_dist.search import controller, selection
from dnal_dist.training.run import Run

# Architecture steps between two looks at the expected cost by the collapse guard.
GUARD_EVERY = 10


class Penalty:
    """The penalty weight of each architecture step: the recipe's, or what the budget asks for."""

    def __init__(self, run: Run, steps: int):
        self.run, self.steps = run, steps
        settings, net, image_size = run.recipe.architecture, run.supernet, run.recipe.data.image_size
        self.budget = selection.budget(settings, net, image_size)
        unit = "macs" if self.budget is None else self.budget.unit
        full = getattr(cost.count(net, image_size), unit)
        self.share = lambda gates: getattr(cost.expected(net, image_size, gates), unit) / full
        if self.budget is not None:
            phase = run.recipe.phases.search
            taken = steps * phase.architecture_steps / (phase.weight_steps + phase.architecture_steps)
            self.loop = controller.Loop(self.budget, settings, self.share, run.architecture, taken)

    def weight(self, delta: float, step: int) -> float:
        """Of the search's iteration `step`; moves the state that the run keeps of it."""
        run, phase = self.run, self.run.recipe.phases.search
        if self.budget is not None:
            run.penalty_weight, run.penalty_lag = self.loop.weight(delta, step / self.steps, run.penalty_lag)
            return run.penalty_weight
        if (step // (phase.weight_steps + phase.architecture_steps)) % GUARD_EVERY == 0:
            self._guard(delta)
        return 0.0 if run.penalty_rests else run.recipe.architecture.penalty_weight

    @torch.no_grad()
    def _guard(self, delta: float) -> None:
        """Let the penalty rest while hardened gates leave less than the recipe's floor of MACs, and say so.

        Soft gates tell nothing yet: all of them may be small together, since the next BatchNorm takes that out again.
        """
        run, settings = self.run, self.run.recipe.architecture
        gates = run.architecture.gates(delta)
        hardened = float((4 * gates * (1 - gates)).mean()) < 0.1
        share = float(self.share(gates))
        collapsing = hardened and share < settings.min_macs
        if collapsing and not run.penalty_rests:
            run.log.global_step = run.global_step
            run.log.warn(
                f"the architecture is collapsing: {share:.2%} of the MACs are left, architecture.min_macs is "
                f"{settings.min_macs:.1%}; the penalty rests. Lower architecture.penalty_weight ({settings.penalty_weight:g})"
            )
        run.penalty_rests = collapsing
