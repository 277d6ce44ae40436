"""What worker processes draw in tests; apart from the tests, so that importing it takes no torch."""

import os
import signal


def draw(number: int, reference: str) -> tuple[str, bytes, str, int]:
    """A sample of `reference`, for splits of samples that nothing has to be made for."""
    return f"{number:03d}", f"image of {reference}".encode(), "png", number % 3


def fail(number: int, reference: str):
    if reference == "t7":
        raise ValueError(f"{reference}: cannot be drawn")
    return draw(number, reference)


def holds_interrupts(task: int, tick) -> bool:
    """Whether this process takes no notice of Ctrl-C."""
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def die(number: int, reference: str):
    os.kill(os.getpid(), signal.SIGKILL)
