"""Errors that name the file or recipe key at fault and the remedy."""

from dnal_dist.common import text


class InputError(ValueError):
    """A fault in what a run was given. The message is one line that names the file or recipe key, what was expected and the remedy.

    local: only this process may have met it, so the others may not know.
    """

    def __init__(self, message: str, local: bool = False):
        # What it names, a key or a file, may come from anywhere, and a terminal obeys control characters.
        super().__init__("\n".join(map(text.printable, message.split("\n"))))
        self.local = local
