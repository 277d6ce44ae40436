"""Standard streams that last: closed by a daemon, broken by `| head`, gone with a terminal, or on a full disk."""

import contextlib
import errno
import io
import os
import sys


class _Lasting(io.FileIO):
    """A stream that drops what can no longer be written. A program prints for people; its result is in files and its exit code."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO, errno.EBADF):
                # For good: also for what libraries and child processes print there.
                with contextlib.suppress(OSError):
                    _null(self.fileno())
            return len(data)


def settle() -> None:
    """Make stdout and stderr last. To be called once, when a command starts."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Left closed, the number would be that of the next file, and everything printed would go into it.
            _null(number)
    # A name that the terminal's encoding lacks is no reason to fail.
    for number, name, errors in ((1, "stdout", "replace"), (2, "stderr", "backslashreplace")):
        stream = getattr(sys, name)
        # What a test or a notebook put there stays.
        if stream is None or stream is getattr(sys, f"__{name}__"):
            encoding = getattr(stream, "encoding", None) or "utf-8"
            buffered = getattr(stream, "line_buffering", True) or number == 2
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            raw = io.BufferedWriter(_Lasting(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, encoding, errors, line_buffering=buffered))


def _null(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
