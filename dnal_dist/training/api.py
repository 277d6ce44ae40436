"""Recipes from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from dnal_dist import recipe
from dnal_dist.distributed.context import Context
from dnal_dist.nets import cost, masks
from dnal_dist.nets.cost import Cost
from dnal_dist.report import records
from dnal_dist.tracking import values
from dnal_dist.training import exit, phases, setup
from dnal_dist.training.stopping import Stopped, StopPoll


class Result(NamedTuple):
    """A finished run."""

    network: nn.Module
    """The compact network, in evaluation mode on the run's device: float32 images (n, 3, H, W), normalised -> logits."""
    accuracy: float
    """Top-1 on the validation set after the finetune, as a fraction."""
    cost: Cost
    """MACs for one image and parameters of the compact network, exact rule."""
    folder: Path
    """The run folder."""


def train_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, overwrite: bool = False, allow_changed: Sequence[str] = ()
) -> Result:
    """Train the recipe at `path`, with `key=value` overrides, and return its result. Like the command, a run whose folder holds a
    checkpoint resumes from it, and a finished one returns at once; overwrite starts again. allow_changed: keys of the recipe that
    may have changed since the run began.

    Raises InputError, a ValueError, for wrong input, and training.stopping.Stopped when the file `stop` appears in the run folder:
    the run is saved then, and the same call resumes it. Signals keep their handlers, so Ctrl-C raises KeyboardInterrupt and the
    same call resumes from the last checkpoint. A missed target is no error: compare `cost` with it.
    """
    settings = recipe.load(path, list(overrides))
    values.require(settings.tracking.tracker)
    context = Context(settings.tracking.tracker, settings.output)
    run = setup.prepare(settings, context, StopPoll(context, None, Path(settings.output) / "stop"), overwrite, allow_changed)
    try:
        phases.train(run)
        exit.finish(run)
        keep = masks.unpack(run.state.mask, run.supernet.num_gates)
        accuracy = records.summary(run.folder)["accuracy"]["finetune"]
        network = run.compact.to(context.device).eval()
        return Result(network, accuracy, cost.count(run.supernet, settings.data.image_size, keep), run.folder)
    except Stopped as stopped:
        exit.save_and_close(run, str(stopped))
        raise
    finally:
        run.log.close()
        run.close()
