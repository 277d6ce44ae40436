"""Named spans of a run, for listeners: the time breakdown, the profiler, chaos. Without one a span costs under a microsecond.

with span("weight step"):
    ...

docs/chaos.md lists the names. Spans nest, and a span of the checkpoint writer belongs to its own thread.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

# Takes a span's name and detail; the context that it returns is entered and left with the span.
Listener = Callable[[str, object], AbstractContextManager]

_SILENT = contextlib.nullcontext()
_listeners: tuple[Listener, ...] = ()


def span(name: str, detail: object = None) -> AbstractContextManager:
    """The span `name` of a run. detail: what a listener may need to know of it (the run, or a file and its content)."""
    if not _listeners:
        return _SILENT
    if len(_listeners) == 1:
        return _listeners[0](name, detail)
    stack = contextlib.ExitStack()
    try:
        for listener in _listeners:
            stack.enter_context(listener(name, detail))
    except BaseException:
        stack.close()
        raise
    return stack


def spanned(name: str) -> Callable:
    """Decorator: each call of the function is a span `name`."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def within_span(*arguments, **named):
            with span(name):
                return function(*arguments, **named)

        return within_span

    return decorate


def attach(listener: Listener) -> None:
    """Call `listener` at each span from here on, in every thread."""
    global _listeners
    _listeners = (*_listeners, listener)


@contextlib.contextmanager
def attached(listener: Listener) -> Iterator[None]:
    """Likewise, within a context."""
    global _listeners
    attach(listener)
    try:
        yield
    finally:
        _listeners = tuple(other for other in _listeners if other is not listener)
