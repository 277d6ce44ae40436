"""Progress of a phase: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

PLAIN_LINE_SECONDS = 30
# Columns of the phase, the time left, the longest metrics, and the spaces between.
PHASE, TIME_LEFT, METRICS, SPACES = 8, 7, 52, 4
NARROWEST_BAR, WIDEST_BAR = 5, 20


class _Metrics(ProgressColumn):
    """Cut to the width that is left: a terminal would wrap a longer line, and the next one would not replace it."""

    def render(self, task):
        return Text(task.fields["text"], no_wrap=True, overflow="ellipsis")


class ProgressLine:
    """One line of a terminal that is redrawn. Without a terminal: a line at the phase's end, and every PLAIN_LINE_SECONDS."""

    def __init__(self, console: Console, phase: str, steps: int, step: int):
        self.console, self.phase, self.steps, self.step, self.printed = console, phase, steps, step, time.monotonic()
        whole = Column(no_wrap=True)
        columns = [TextColumn(f"{phase:{PHASE}}"), MofNCompleteColumn(table_column=whole), TimeRemainingColumn(table_column=whole)]
        left = console.width - PHASE - (2 * len(str(steps)) + 1) - TIME_LEFT - METRICS - SPACES
        if left >= NARROWEST_BAR:
            columns.insert(1, BarColumn(min(WIDEST_BAR, left)))
        columns.append(_Metrics())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(phase, total=steps, completed=step, text="")
        self.bar.start()

    def update(self, step: int, text: str) -> None:
        self.step = step
        self.bar.update(self.task, completed=step, text=text)
        if not self.console.is_terminal and time.monotonic() - self.printed > PLAIN_LINE_SECONDS:
            self._print(text)

    def finish(self, text: str) -> None:
        """Leave the line as that of a finished phase."""
        self.update(self.steps, text)
        self.bar.stop()
        if not self.console.is_terminal:
            self._print(text)

    def stop(self) -> None:
        """Leave the line as it stands."""
        self.bar.stop()

    def _print(self, text: str) -> None:
        self.printed = time.monotonic()
        line = f"{self.phase:9} {self.step:>{len(str(self.steps))}}/{self.steps}  {text}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        sys.stdout.flush()
