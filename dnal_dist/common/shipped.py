"""Folders that ship with the package: recipes and slurm."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped(folder: str) -> Path:
    """A wheel holds the folder inside the package, a checkout beside it."""
    return PACKAGE / folder if (PACKAGE / folder).is_dir() else PACKAGE.parent / folder


def named(path: str) -> str:
    """The shipped file or folder `path` (recipes/accelerate) as a command here can name it: in full outside of a checkout."""
    head, _, rest = path.partition("/")
    return path if Path(path).exists() else str(shipped(head) / rest)
