"""Progress of a phase: a line that is redrawn on a terminal, plain lines with the time of day elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

PLAIN_LINE_SECONDS = 30
PHASE, NARROWEST, BAR = 8, 100, 20


class _Words(ProgressColumn):
    """Cut to the width that is left: a terminal would wrap a longer line, and the next one would not replace it."""

    def render(self, task):
        return Text(task.fields["text"], no_wrap=True, overflow="ellipsis")


class ProgressLine:
    """One line of a terminal that is redrawn. Without a terminal: a line at the phase's end, and every PLAIN_LINE_SECONDS."""

    def __init__(self, console: Console, phase: str, steps: int, step: int):
        self.console, self.phase, self.printed = console, phase, time.monotonic()
        columns = [TextColumn(f"{phase:{PHASE}}"), _Words()]
        if console.width >= NARROWEST:
            columns.insert(1, BarColumn(BAR))
        self.steps = steps
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(phase, total=steps, completed=step, text="")
        self.bar.start()

    def update(self, text: str, step: int | None = None) -> None:
        """step: of the phase; None: as before."""
        self.bar.update(self.task, completed=step, text=text)
        if not self.console.is_terminal and time.monotonic() - self.printed > PLAIN_LINE_SECONDS:
            self._print(text)

    def finish(self, text: str) -> None:
        """Leave the line as that of a finished phase."""
        self.bar.update(self.task, completed=self.steps, text=text)
        self.bar.stop()
        if not self.console.is_terminal:
            self._print(text)

    def stop(self) -> None:
        """Leave the line as it stands."""
        self.bar.stop()

    def _print(self, text: str) -> None:
        self.printed = time.monotonic()
        line = f"{time.strftime('%H:%M:%S')}  {self.phase:{PHASE}}  {text}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        sys.stdout.flush()


class Pace:
    """How long a phase and all later ones still take, by the speed of this phase since it began or the run resumed, evaluations
    and checkpoints counted in. Later phases are taken to be as fast, which is too long for a compact network."""

    def __init__(self, step: int, steps: int, later: int):
        """step, steps: iterations of the phase that are done, and all; later: those of later phases."""
        self.first, self.steps, self.later, self.begun = step, steps, later, time.monotonic()

    def left(self, step: int) -> tuple[float, float] | None:
        """Seconds of the phase and of the run behind `step`; None if no speed is known yet."""
        if step <= self.first:
            return None
        each = (time.monotonic() - self.begun) / (step - self.first)
        return each * (self.steps - step), each * (self.steps - step + self.later)


def brief(seconds: float) -> str:
    """A duration in at most six characters: 45s, 12m, 1h02m, 3d04h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f}s"
    if seconds < 6000:
        return f"{minutes}m"
    return f"{minutes // 60}h{minutes % 60:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"
