"""The ends of a run: finished, stopped, interrupted, or refused for wrong input."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common.errors import InputError
from dnal_dist.distributed.context import remove_temp
from dnal_dist.nets import masks
from dnal_dist.report import outputs
from dnal_dist.search.budgets import MEASURED
from dnal_dist.training import stopping, usage
from dnal_dist.training.run import Run
from dnal_dist.training.speed import record_latency

# Seconds that a process which lost its peers, or whose peer reports the error, waits to be ended by the launcher.
PATIENCE_SECONDS = 20
# Seconds that the tracker of a finished run has for its last records, the compact network and the report; and the tracker of an
# interrupted one for its last records.
UPLOAD_SECONDS, HURRY_SECONDS = 60.0, 2.0


def finish(run: Run) -> str | None:
    """Close the run and write its report. Returns, on all processes, a message if the network misses the recipe's target. Raises
    InputError if the last checkpoint could not be written: the run is not finished then."""
    run_log, state = run.log, run.state
    if not run.context.from_main(run.writer.finish()):
        raise InputError(
            f"{run.folder}: the network is trained, but its last checkpoint cannot be written (see the warnings above); the same "
            "command goes on from the one before"
        )
    if not run_log.ended:
        record_latency(run)
        per_phase = {phase: round(s, 3) for phase, s in state.seconds.items()}
        images = state.global_step * run.recipe.data.global_batch
        ledger = {phase: usage.summary(state, phase) for phase in state.seconds}
        run_log.record("end", seconds=round(sum(state.seconds.values()), 3), phase_seconds=per_phase, images=images, ledger=ledger)
        if run.writer.writes:
            run_log.print(run.writer.summary())
    if run.context.main:
        _remove_stop_file(run)
        reported = _report(run, lambda folder: outputs.write_all(folder, draw=run.recipe.tracking.plots))
        # The tracker gets the report, so it is closed only now.
        run_log.close(UPLOAD_SECONDS, finished=True)
        if reported:
            _report(run, outputs.print_table)
    missed = run.context.from_main(_missed(run) if run.context.main else None)
    run.context.close()
    return missed


def pause(run: Run, phase: str) -> None:
    """Close a run that goes no further than behind `phase`. Raises InputError if its last checkpoint could not be written."""
    if not run.context.from_main(run.writer.finish()):
        raise InputError(f"{run.folder}: the checkpoint behind {phase} cannot be written (see the warnings above)")
    run.log.record("stop", phase=run.state.phase, step=run.state.step, reason=f"--until {phase}")
    run.log.print(f"{phase} is done: the same command without --until goes on")
    run.log.close()
    run.context.close()


def _report(run: Run, do: Callable) -> bool:
    """Whether the report was written, or its table printed; the run itself is complete without it."""
    try:
        do(run.folder)
    # Any error of a report is no error of the run.
    except Exception as error:
        why = getattr(error, "strerror", None) or error
        message = f"the report in {run.folder} cannot be written ({why}); later: python -m dnal_dist.report {run.folder}"
        print(f"warning: {message}", file=sys.stderr)
        return False
    return True


def _missed(run: Run) -> str | None:
    if run.budget is None:
        return None
    target = run.budget.corrected(run.state.latency_factor, MEASURED) if run.state.latency_factor else run.budget
    return target.missed(run.supernet, run.recipe.data.image_size, masks.unpack(run.state.mask, run.supernet.num_gates))


def refuse(run, context, signals, error: InputError) -> None:
    """Exit with 2 and one line about the error; where all processes of a machine have the same error, one of them reports it."""
    # The launcher ends all processes as soon as one has ended: the reporting one must not be cut short by the others.
    if error.local or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif signalled(signals):
        sys.exit(2)
    if run is not None:
        run.log.abandon()
    report_error(f"error: {error}")
    if run is not None:
        run.log.close()
        # Waits for the checkpoint that is being written.
        run.close()
    if context is not None:
        if not error.local:
            context.close()
        context.leave(2)
    sys.exit(2)


def report_error(line: str) -> None:
    """Print `line` on stderr, and give it to the launcher for its summary of the process that failed first."""
    print(line, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        now = str(int(time.time()))
        Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": {"timestamp": now}}}))


def signalled(signals: stopping.Signals) -> bool:
    """Whether Ctrl-C or SIGTERM came, or comes within PATIENCE_SECONDS."""
    until = time.monotonic() + PATIENCE_SECONDS
    try:
        while not signals.received and time.monotonic() < until:
            time.sleep(0.05)
    except KeyboardInterrupt:
        return True
    return signals.received is not None


def save_and_close(run: Run, why: str) -> None:
    """After all processes agreed to stop: wait for the checkpoint, report where the run stands, and close its log."""
    state, saved = run.state, run.writer.finish()
    if run.context.main:
        run.log.abandon()
        _remove_stop_file(run)
        rest = "the same command goes on from here" if saved else _last_checkpoint(run)
        report_error(f"stopped ({why}) in {state.phase} after {state.step} steps ({state.global_step} in all); {rest}")
    run.log.close()


def leave(run: Run, signals: stopping.Signals, why: str) -> None:
    """End after all processes agreed to stop, with exit code STOPPED."""
    signals.interrupt = lambda: os._exit(130)
    save_and_close(run, why)
    # A launcher ends all processes when the first has ended: none may before the checkpoint is written.
    with contextlib.suppress(RuntimeError):
        run.context.wait()
        run.context.close()
    run.close()
    run.context.leave(stopping.STOPPED)
    sys.exit(stopping.STOPPED)


def _remove_stop_file(run: Run) -> None:
    """Left there, it would stop the resumed run."""
    with contextlib.suppress(OSError):
        (run.folder / "stop").unlink()


def interrupted(run, signals: stopping.Signals) -> None:
    """End at once, without a checkpoint: before training, after a second Ctrl-C, or when other processes have ended."""
    # The launcher's own signal after Ctrl-C must not cut this short.
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if int(os.environ.get("RANK", 0)) == 0:
        if run is not None:
            run.log.abandon()
        where = (
            "before training began"
            if run is None
            else f"in {run.state.phase} after {run.state.step} steps; {_last_checkpoint(run)}"
        )
        print(f"\nstopped {where}", file=sys.stderr, flush=True)
        if run is not None:
            run.log.close(HURRY_SECONDS)
    remove_temp()
    # Without closing the process group, which would wait for processes that have ended.
    sys.stdout.flush()
    os._exit(130 if signals.impatient else stopping.STOPPED)


def _last_checkpoint(run: Run) -> str:
    path, _, _ = checkpoint.latest(run.folder / "checkpoints")
    return f"the same command goes on from {path.name}" if path else "there is no checkpoint: the same command starts again"
