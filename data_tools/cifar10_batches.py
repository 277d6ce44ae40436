"""Reads the batches of CIFAR-10's version for Python without unpickling them.

Such a file is a program for a small machine, and one that can import and call anything. Here its instructions are only looked at:
those that build plain data are followed, and of functions none but the two that NumPy writes for an array of bytes is understood,
as data, by the code below. Nothing is imported or called because a file asks for it; anything else is refused.
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MARK = object()
MOST_INSTRUCTIONS = 1_000_000
# A batch's tuples tell an array's shape and type. Python ends the process when it walks a tuple that is nested too deeply.
MOST_PARTS, DEEPEST = 16, 3
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Name(NamedTuple):
    """What a file calls a function or class. It stays a name."""

    text: str


ARRAY = Name("numpy.core.multiarray _reconstruct")
ARRAY_TYPE = Name("numpy ndarray")
NUMBER_TYPE = Name("numpy dtype")


class Bytes:
    """The type of an array's elements, which must be unsigned bytes."""


class Array:
    """An array that is being built; BUILD gives it its content."""

    pixels: np.ndarray | None = None


def read(content: bytes) -> dict[str, Any]:
    """The dictionary in a batch: text, whole numbers, lists, tuples, dictionaries and uint8 arrays.

    Raises ValueError for a file that holds or asks for anything else, or is damaged.
    """
    machine = _Machine()
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(content)):
            if count > MOST_INSTRUCTIONS:
                raise ValueError("more instructions than a batch has")
            if instruction.name == "STOP":
                break
            machine.follow(instruction.name, argument)
        (found,) = machine.stack
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a batch of CIFAR-10 ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"not a batch of CIFAR-10 (a {type(found).__name__}, expected a dictionary)")
    return {name: value.pixels if isinstance(value, Array) else value for name, value in found.items()}


class _Machine:
    def __init__(self):
        self.stack: list = []
        self.memo: dict[int, Any] = {}

    def follow(self, name: str, argument: Any) -> None:
        if name in VALUES:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in TUPLES:
            self._tuple(self._take(TUPLES[name]))
        elif name in FOLLOWED:
            FOLLOWED[name](self, argument)
        elif name != "PROTO":
            raise ValueError(f"it asks for {name}, which no batch needs")

    def _take(self, count: int) -> list:
        if len(self.stack) < count:
            raise ValueError("it takes more than there is")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _after_mark(self) -> list:
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise ValueError("a mark is missing")
        taken = self._take(len(self.stack) - at)
        return taken[1:]

    def mark(self, _) -> None:
        self.stack.append(MARK)

    def tuple(self, _) -> None:
        self._tuple(self._after_mark())

    def _tuple(self, parts: list) -> None:
        if len(parts) > MOST_PARTS or 1 + max(map(_depth, parts), default=0) > DEEPEST:
            raise ValueError("a tuple larger than those of a batch")
        self.stack.append(tuple(parts))

    def keep(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def get(self, number: int) -> None:
        self.stack.append(self.memo[number])

    def append(self, _) -> None:
        (value,) = self._take(1)
        self._extend([value])

    def appends(self, _) -> None:
        self._extend(self._after_mark())

    def _extend(self, values: list) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to what is no list")
        self.stack[-1].extend(values)

    def set_item(self, _) -> None:
        self._set(self._take(2))

    def set_items(self, _) -> None:
        self._set(self._after_mark())

    def _set(self, values: list) -> None:
        if type(self.stack[-1]) is not dict:
            raise ValueError("it sets items of what is no dictionary")
        if not all(type(key) is str for key in values[::2]):
            raise ValueError("a dictionary's key is no text")
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def name(self, text: str) -> None:
        if Name(text) not in (ARRAY, ARRAY_TYPE, NUMBER_TYPE):
            raise ValueError(f"it asks for {text.replace(' ', '.')!r}, which no batch needs")
        self.stack.append(Name(text))

    def reduce(self, _) -> None:
        function, arguments = self._take(2)
        if function == ARRAY and arguments[0] == ARRAY_TYPE:
            self.stack.append(Array())
        elif function == NUMBER_TYPE and arguments[0] == "u1":
            self.stack.append(Bytes())
        else:
            raise ValueError("it asks for an array of other than bytes")

    def build(self, _) -> None:
        (state,) = self._take(1)
        target = self.stack[-1]
        if isinstance(target, Bytes):
            return
        if not isinstance(target, Array):
            raise ValueError("it builds what is no array")
        _, shape, kind, column_major, values = state
        if not isinstance(kind, Bytes) or column_major:
            raise ValueError("an array of other than bytes in rows")
        # A version for Python 2: its strings are bytes, and are read as Latin-1 text, in which each character is one byte.
        target.pixels = np.frombuffer(values.encode("latin-1"), np.uint8).reshape(shape)


def _depth(value: Any) -> int:
    """How deeply a tuple that was let pass is nested; 0 for what is none."""
    return 1 + max(map(_depth, value), default=0) if type(value) is tuple else 0


FOLLOWED: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple,
    "BINPUT": _Machine.keep,
    "LONG_BINPUT": _Machine.keep,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
