"""The training command: a recipe with signals, a time limit, messages and exit codes around it."""

import multiprocessing
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.distributed.context import Context
from dnal_dist.tracking import values
from dnal_dist.tracking.run_log import CLOSE_SECONDS
from dnal_dist.training import exit, phases, profiling, setup, stopping
from dnal_dist.training.stopping import StopPoll

# Exit code of a run that trained to its end, but whose network misses the recipe's target.
MISSED = 3


def run_recipe(
    path: str,
    overrides: Sequence[str],
    overwrite: bool,
    allowed: Sequence[str],
    max_time: str | None,
    profiled_steps: int | None = None,
    until_phase: str | None = None,
) -> None:
    """Train the recipe at `path`. Exits with a code of docs/resuming.md, unless all went well in the only process.

    profiled_steps: steps of each phase to trace into RUN/profile; None: no trace. until_phase: the phase behind which the run is
    left; None: the last.
    """
    signals = stopping.Signals(_interrupt)
    context = run = None
    try:
        settings = recipe.load(path, overrides)
        until = stopping.limit(max_time)
        tracker = settings.tracking.tracker
        values.require(tracker)
        context = Context(tracker, settings.output)
        # A tracker that hangs is abandoned up to five seconds later.
        leaving = 0.0 if tracker == "none" else CLOSE_SECONDS + 5.0
        stops = StopPoll(context, signals, Path(settings.output) / "stop", until, leaving)
        run = setup.prepare(settings, context, stops, overwrite, allowed)
        signals.training = True
        with profiling.traced(run, profiled_steps):
            finished = phases.train(run, until_phase)
        missed = exit.finish(run) if finished else exit.pause(run, until_phase)
        if missed and context.main:
            exit.report_error(f"error: {missed}")
        run.close()
        context.leave(MISSED if missed else 0)
        if missed:
            sys.exit(MISSED)
    except stopping.Stopped as stopped:
        exit.leave(run, signals, str(stopped))
    except InputError as error:
        exit.refuse(run, context, signals, error)
    except KeyboardInterrupt:
        exit.interrupted(run, signals)
    except RuntimeError as error:
        # While everything is being stopped, a peer or a loader may end before this process gets its signal.
        loader_died = "DataLoader worker" in str(error)
        stopping_all = isinstance(error.__context__, KeyboardInterrupt)
        if stopping_all or ((loader_died or (context is not None and context.world_size > 1)) and exit.signalled(signals)):
            exit.interrupted(run, signals)
        if not loader_died:
            raise
        why = str(error).splitlines()[0].rstrip(". ")
        message = f"key 'data.workers': a loader process died ({why}); lower it, or give the machine more (shared) memory"
        exit.refuse(run, context, signals, InputError(message, local=True))
    finally:
        if run is not None:
            run.close()


def _interrupt() -> None:
    # The same signal may have ended loaders too. Torch would raise an error for each, wherever this process is by then.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # At once: a loader that is interrupted while handing over a batch prints a traceback.
    for loader in multiprocessing.active_children():
        loader.kill()
    raise KeyboardInterrupt
