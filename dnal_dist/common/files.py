"""Reading files that somebody else may have made."""

import os
import stat
from pathlib import Path

from dnal_dist.common.errors import InputError


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. A FIFO or a device would never end, or never begin.

    Raises InputError naming the path and the remedy, FileNotFoundError, and OSError for what cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode):
        os.close(handle)
        raise InputError(f"{path}: not a regular file; put the file itself there")
    with open(handle, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{path}: {max(facts.st_size, len(content)):,} bytes, expected at most {most:,}; it is no such file")
    return content
