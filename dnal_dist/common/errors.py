"""Errors that name the file or recipe key at fault and the remedy."""

import errno
import re

from dnal_dist.common import text

# Where a shard server, a bucket or a machine takes its credentials from, without a recipe that holds them.
CREDENTIALS = (
    "credentials come from the environment, ~/.aws, a netrc file or GOOGLE_APPLICATION_CREDENTIALS; an S3 endpoint from "
    "AWS_ENDPOINT_URL, and FSSPEC_S3_ANON=true goes without credentials"
)
# Runs are bounded, so that a long text takes no longer than its length.
# user:password@ of a URL or of host:/path, with or without a scheme; and a query string or fragment with values, as signatures are.
_USER = re.compile(
    r"(?<=//)(?:[^\s/'\"]{0,2048}@|[^\s/'\":]{0,2048}:(?!\d+/)[^\s'\"]{0,2048}@)"
    r"|(?<![^\s'\"=(\[{,])[^\s/'\"=(\[{,:]{1,2048}:(?!//)[^\s'\"@]{1,2048}@(?=[\w.-])"
)
_QUERY = re.compile(r"(://[^\s'\"?#]{0,2048}[?#])[^\s'\"]{0,2048}=[^\s'\",;)\]]*")


class InputError(ValueError):
    """A fault in what a run was given. The message is one line that names the file or recipe key, what was expected and the remedy;
    passwords in it are left out.

    local: only this process may have met it, so the others may not know.
    """

    def __init__(self, message: str, local: bool = False):
        # What it names, a key or a file, may come from anywhere, and a terminal obeys control characters.
        super().__init__(without_secrets("\n".join(map(text.printable, message.split("\n")))))
        self.local = local


def secret_in(words: str) -> str | None:
    """What of `words` may be a secret ("a user or password", "a query string"); None if nothing is."""
    if _USER.search(words):
        return "a user or password"
    return "a query string" if _QUERY.search(words) else None


def without_secrets(words: str) -> str:
    return _QUERY.sub(r"\1...", _USER.sub("...@", words))


def reason(error: BaseException) -> str:
    """The message of an exception as one line that a terminal may show: what the system says, and of which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    # Python's own remedy, for programs that read such numbers on purpose, is none here.
    found = text.printable(" ".join(str(error).split()))[:300].partition("; use sys.set_int_max_str_digits()")[0]
    return found or type(error).__name__


def remedy(error: BaseException) -> str:
    """What to do about a file that cannot be written: a ValueError is one of values that are not finite."""
    number = getattr(error, "errno", None)
    if isinstance(error, ValueError):
        return "lower the learning rate"
    if isinstance(error, MemoryError):
        return "free memory"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "give permission to write there, or name another folder"
    if number in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        return "see that the folder is there and its disk is mounted"
    return "see that its disk or server works, or name another folder"
