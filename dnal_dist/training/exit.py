"""How a run ends: finished, stopped, interrupted, or because something that it was given is wrong."""

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
from dnal_dist.report import outputs, records
from dnal_dist.training import stopping, usage
from dnal_dist.training.run import Run

# How long a process that lost its peers, or leaves it to another to say what is wrong, waits to be ended by the launcher.
PATIENCE_SECONDS = 20
# How long the tracker of a finished run has for its last records, the compact network and the report; and that of one that is
# interrupted for what it was given.
UPLOAD_SECONDS, HURRY_SECONDS = 60.0, 2.0


def finish(run: Run) -> str | None:
    """Close the run and write its report. Returns, on all processes, what to say if the network misses the recipe's target."""
    run_log = run.log
    run_log.global_step = run.global_step
    run.writer.finish()
    if not run_log.ended:
        per_phase = {phase: round(s, 3) for phase, s in run.seconds.items()}
        images = run.global_step * run.recipe.data.global_batch
        spent = {phase: usage.told(run, phase) for phase in run.seconds}
        run_log.record("end", seconds=round(sum(run.seconds.values()), 3), phase_seconds=per_phase, images=images, ledger=spent)
        if run.writer.writes:
            run_log.say(run.writer.told())
    if run.context.main:
        _take_away_stop(run)
        reported = _tell_of_report(run, lambda folder: outputs.write_all(folder, draw=run.recipe.tracking.plots))
        # The tracker gets the report, so it is closed only now.
        run_log.close(UPLOAD_SECONDS, finished=True)
        if reported:
            _tell_of_report(run, outputs.print_table)
    missed = run.context.from_main(_missed(run) if run.context.main else None)
    run.context.close()
    return missed


def _tell_of_report(run: Run, do: Callable) -> bool:
    """Whether the report could be written, or its table printed; what was trained is there anyway."""
    try:
        do(run.folder)
    # Whatever is wrong with a report, the run that it is about is not.
    except Exception as error:
        why = getattr(error, "strerror", None) or error
        told = f"the report in {run.folder} cannot be written ({why}); later: python -m dnal_dist.report {run.folder}"
        print(f"warning: {told}", file=sys.stderr)
        return False
    return True


def _missed(run: Run) -> str | None:
    target = run.budget
    if target is None:
        return None
    found = records.summary(run.folder)["compact"]["exact"][target.unit]
    return None if found in target else target.missed(found)


def refuse(run, context, signals, error: InputError) -> None:
    """End with one line that says what was wrong; where all processes of a machine met the same fault, one of them speaks."""
    # The launcher ends all processes as soon as one has ended: the one that speaks must not be cut short by those that do not.
    if error.local or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif signalled(signals):
        sys.exit(2)
    if run is not None:
        run.log.abandon()
    say_why(f"error: {error}")
    if run is not None:
        run.log.close()
        # With the checkpoint that is being written.
        run.close()
    if context is not None:
        if not error.local:
            context.close()
        context.leave(2)
    sys.exit(2)


def say_why(line: str) -> None:
    """On stderr, and on the page about the process that failed first with which a launcher ends."""
    print(line, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        now = str(int(time.time()))
        Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": {"timestamp": now}}}))


def signalled(signals: stopping.Signals) -> bool:
    """Whether Ctrl-C or SIGTERM came, or comes within PATIENCE_SECONDS."""
    until = time.monotonic() + PATIENCE_SECONDS
    try:
        while not signals.asked and time.monotonic() < until:
            time.sleep(0.05)
    except KeyboardInterrupt:
        return True
    return signals.asked is not None


def leave(run: Run, signals: stopping.Signals, why: str) -> None:
    """End after all processes agreed to stop: wait for the checkpoint, say where the run stands, and exit with STOPPED."""
    signals.interrupt = lambda: os._exit(130)
    saved = run.writer.finish()
    if run.context.main:
        run.log.abandon()
        _take_away_stop(run)
        rest = "the same command goes on from here" if saved else _last_checkpoint(run)
        say_why(f"stopped ({why}) in {run.phase} after {run.step} steps ({run.global_step} in all); {rest}")
    run.log.close()
    # A launcher ends all processes when the first has ended: none may before the checkpoint is written.
    with contextlib.suppress(RuntimeError):
        run.context.wait()
        run.context.close()
    run.close()
    run.context.leave(stopping.STOPPED)
    sys.exit(stopping.STOPPED)


def _take_away_stop(run: Run) -> None:
    """Asked for and done; left there, it would stop the run that goes on."""
    with contextlib.suppress(OSError):
        (run.folder / "stop").unlink()


def interrupted(run, signals: stopping.Signals) -> None:
    """End at once, without a checkpoint: before training, after a second Ctrl-C, or where others are gone already."""
    # The launcher's own signal after Ctrl-C must not cut this short.
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if int(os.environ.get("RANK", 0)) == 0:
        if run is not None:
            run.log.abandon()
        where = "before training began" if run is None else f"in {run.phase} after {run.step} steps; {_last_checkpoint(run)}"
        print(f"\nstopped {where}", file=sys.stderr, flush=True)
        if run is not None:
            run.log.close(HURRY_SECONDS)
    remove_temp()
    # Without the farewells of the process group, which would wait for processes that are gone.
    sys.stdout.flush()
    os._exit(130 if signals.impatient else stopping.STOPPED)


def _last_checkpoint(run: Run) -> str:
    path, _, _ = checkpoint.latest(run.folder / "checkpoints")
    return f"the same command goes on from {path.name}" if path else "there is no checkpoint: the same command begins anew"
