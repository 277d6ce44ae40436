"""What all commands have in common."""

import functools
import sys
from collections.abc import Callable

from dnal_dist.common import streams
from dnal_dist.common.errors import InputError


def door(main: Callable[[], None]) -> Callable[[], None]:
    """Decorator of a command's `main`: its standard streams last, wrong input is one line on stderr and exit code 2, and Ctrl-C
    leaves no traceback."""

    @functools.wraps(main)
    def opened() -> None:
        streams.settle()
        try:
            main()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return opened
