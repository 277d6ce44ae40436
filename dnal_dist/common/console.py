"""Lines and tables for people. rich takes time to import, so only what prints does that."""

from collections.abc import Callable, Collection, Iterable, Sequence


def printer(console=None) -> Callable:
    """A function that prints words, or (words, style), uncut; plain where stdout is no terminal."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    return lambda *parts: console.print(Text.assemble(*parts), soft_wrap=True, highlight=False)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[int] = (0,), width: int = 120) -> None:
    """Print a table at least `width` wide: numbers cut by a narrower terminal would be wrong ones. words: the columns that are no
    numbers; all but the first wrap."""
    from rich.console import Console
    from rich.table import Table

    made, console = Table(box=None, pad_edge=False, header_style="bold"), Console()
    for number, name in enumerate(head):
        made.add_column(name, justify="left" if number in words else "right", no_wrap=number not in words or not number)
    for row in rows:
        made.add_row(*row)
    console.width = max(console.width, width)
    console.print(made)
