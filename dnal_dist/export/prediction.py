"""An export at work: images in, classes out."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dnal_dist.common.errors import InputError, reason
from dnal_dist.common.files import read_regular
from dnal_dist.data.decoding import ImageError
from dnal_dist.export import readers
from dnal_dist.export.images import data_of, preprocessed

# Bytes of preprocessing.json, and of an image file.
MOST_JSON, MOST_IMAGE = 16 << 20, 1 << 30
# Those that can run no program of whoever wrote them, as model.py does, and a pickle in model.pt2 may.
_BY_DEFAULT = ("model.onnx", "model.xml")


class Model:
    """A file of an export that runs, and its preprocessing. Raises InputError if there is none."""

    def __init__(self, folder: Path, runtime: str | None = None, threads: int | None = None):
        if not (folder / "preprocessing.json").exists() and (folder / "export").is_dir():
            folder = folder / "export"
        self.folder, self.how = folder, preprocessing_of(folder / "preprocessing.json")
        wanted = [readers.FILES[runtime]] if runtime else list(_BY_DEFAULT)
        there = [file for file in wanted if (folder / file).is_file()]
        why = ""
        for file in there:
            try:
                self.run, self.file = readers.opened(folder, file, threads), file
                return
            except ImportError as error:
                why = f"; {error.name} is not installed"
            except Exception as error:  # of many kinds: each runtime has its own
                raise InputError(f"{folder / file}: cannot be loaded ({reason(error)}); export it again") from None
        raise InputError(
            f"{folder}: no {' or '.join(there or wanted)} that can be run{why}; export it by --to, or name another --runtime"
        )


def preprocessing_of(path: Path) -> dict:
    """The preprocessing of an export. Raises InputError."""
    try:
        how = json.loads(read_regular(path, MOST_JSON))
        if data_of(how).resize > 1 << 14 or not all(isinstance(name, str) for name in how["class_names"]):
            raise ValueError("its values are of other kinds")
        return how
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file, so {path.parent} is no export; make one by python -m dnal_dist.export RUN"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not the preprocessing of an export ({reason(error)}); export it again") from None


def predicted(model: Model, path: Path, top: int) -> dict:
    """{"image", "classes": [{"class", "number", "probability"}]}, the likeliest first; "error" in place of classes that are not
    known, since the file is no image."""
    try:
        images = preprocessed(read_regular(path, MOST_IMAGE), data_of(model.how))
    except (OSError, ImageError, InputError) as error:
        return {"image": str(path), "error": reason(error)}
    (shares,) = probabilities(model.run(images))
    names: Sequence[str] = model.how["class_names"]
    order = np.argsort(-shares, kind="stable")[:top].tolist()
    named = [(number, names[number] if number < len(names) else str(number)) for number in order]
    return {
        "image": str(path),
        "classes": [{"class": name, "number": number, "probability": float(shares[number])} for number, name in named],
    }


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of logits (n, classes)."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
