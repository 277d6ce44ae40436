"""Files of an archive that is read where it lies."""

import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath


def contents(archive: Path, wanted: Iterable[str], most: int, remedy: str) -> dict[str, bytes]:
    """Up to `most` bytes of each wanted file of a tar, compressed or not, wherever in it. Nothing is written to disk, so names in
    it can do no harm. Raises ValueError for what is no whole archive; remedy: the end of the message."""
    try:
        with tarfile.open(archive) as tar:
            members = {PurePosixPath(member.name).name: member for member in tar if member.isreg()}
            # The checksum, which shows damage within a file, lies at the end of the archive.
            while tar.fileobj.read(1 << 20):
                pass
            return {name: tar.extractfile(members[name]).read(most) for name in wanted if name in members}
    except FileNotFoundError:
        raise ValueError(f"{archive}: no such file; {remedy}") from None
    except Exception as error:  # of many kinds, depending on where the archive is damaged
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise ValueError(f"{archive}: not a whole tar archive ({why}); {remedy}") from None
