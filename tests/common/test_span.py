"""Spans reach their listeners in order, and cost next to nothing without one."""

import contextlib
import timeit

import pytest

from dnal_dist.common import span as spans
from dnal_dist.common.span import span, spanned


class Listener:
    def __init__(self, events: list, label: str = "", refuses: str | None = None):
        self.events, self.label, self.refuses = events, label, refuses

    @contextlib.contextmanager
    def __call__(self, name, detail):
        if name == self.refuses:
            raise KeyError(name)
        self.events.append((f"{self.label}+{name}", detail))
        try:
            yield
        finally:
            self.events.append((f"{self.label}-{name}", detail))


@pytest.fixture
def attached():
    with contextlib.ExitStack() as stack:
        yield lambda listener: stack.enter_context(spans.attached(listener))


def test_a_listener_sees_spans_nested_and_with_their_detail(attached):
    events = []
    attached(Listener(events))

    @spanned("outer")
    def outer():
        with span("inner", 3):
            return "value"

    assert outer() == "value" and outer.__name__ == "outer"
    assert events == [("+outer", None), ("+inner", 3), ("-inner", 3), ("-outer", None)]


def test_several_listeners_are_left_in_reverse_even_when_one_refuses(attached):
    events = []
    attached(Listener(events, "a"))
    attached(Listener(events, "b", refuses="bad"))
    with span("good"):
        pass
    assert [event for event, _ in events] == ["a+good", "b+good", "b-good", "a-good"]
    del events[:]
    with pytest.raises(KeyError), span("bad"):
        pass
    assert [event for event, _ in events] == ["a+bad", "a-bad"]


def test_errors_pass_through_a_span(attached):
    for listeners in range(3):
        with pytest.raises(ZeroDivisionError), span("division"):
            raise ZeroDivisionError
        attached(Listener([], str(listeners)))


def test_detached_listeners_are_not_called():
    events = []
    with spans.attached(Listener(events)):
        pass
    with span("silent"):
        pass
    assert events == []


def test_a_span_without_listeners_costs_under_two_microseconds():
    def once():
        with span("step"):
            pass

    assert min(timeit.repeat(once, number=2000, repeat=20)) / 2000 < 2e-6
