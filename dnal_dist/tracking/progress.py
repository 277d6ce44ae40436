"""Progress of a phase: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 30


class _Bar:
    """A line of a terminal that is drawn over and over."""

    def __init__(self, console: Console, phase: str, steps: int, done: int):
        columns = (
            TextColumn(f"{phase:9}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.bar = Progress(*columns, console=console)
        self.task = self.bar.add_task(phase, total=steps, completed=done, text="")
        self.bar.start()

    def update(self, step: int, text: str) -> None:
        self.bar.update(self.task, completed=step, text=text)

    def finish(self, text: str) -> None:
        self.update(self.bar.tasks[0].total, text)
        self.bar.stop()

    def abandon(self) -> None:
        self.bar.stop()


class _PlainLine:
    """One line at a phase's end, for logs; in a long phase one every PLAIN_LINE_SECONDS too."""

    def __init__(self, console: Console, phase: str, steps: int, done: int):
        self.console, self.phase, self.steps, self.step = console, phase, steps, done
        self.last = time.monotonic()

    def update(self, step: int, text: str) -> None:
        self.step = step
        if time.monotonic() - self.last > PLAIN_LINE_SECONDS:
            self._print(text)

    def finish(self, text: str) -> None:
        self.step = self.steps
        self._print(text)

    def abandon(self) -> None:
        pass

    def _print(self, text: str) -> None:
        self.last = time.monotonic()
        line = f"{self.phase:9} {self.step:>{len(str(self.steps))}}/{self.steps}  {text}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        sys.stdout.flush()
