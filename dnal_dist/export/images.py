"""Images for the proof, and the preprocessing of an export: what the evaluation of a recipe does to an image, as data."""

import contextlib
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.data.images import Transform, normalise
from dnal_dist.data.remote import RemoteError
from dnal_dist.data.samples import Fault
from dnal_dist.data.shards import Shards

BATCH = 32


class Images(NamedTuple):
    """Images of a validation set, or drawn ones."""

    count: int
    of: int
    """Images of the validation set; 0 for drawn ones."""
    why: str
    """Why they are drawn; "" if they are not."""
    class_names: list[str]
    data: recipe.Data
    shards: Shards | None
    chosen: list[int]

    def batches(self) -> Iterator[Tensor]:
        """float32 (n, 3, H, W), preprocessed, n up to 32; images that cannot be decoded are left out."""
        size = self.data.image_size
        if self.shards is None:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randint(0, 256, (self.count, 3, size, size), dtype=torch.uint8, generator=generator)
            yield from (normalise(part, self.data.mean, self.data.std) for part in drawn.split(BATCH))
            return
        transform = Transform(self.data, 0, train=False)
        for at in range(0, len(self.chosen), BATCH):
            found = []
            for index in self.chosen[at : at + BATCH]:
                with contextlib.suppress(Fault, ValueError):  # of which ImageError is one
                    found.append(transform(self.shards[index].image, 0, index)[0])
            if found:
                yield normalise(torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2), self.data.mean, self.data.std)


def validation_images(settings: recipe.Recipe, classes: int, most: int | None) -> Images:
    """Up to `most` images of the recipe's validation set, spread over it; of a remote one the first, since whole shards are copied.
    Drawn ones if it cannot be read."""
    data = settings.data
    try:
        shards = Shards(data.val, "data.val", classes, data)
        count = shards.samples if most is None else min(most, shards.samples)
        chosen = np.arange(count) if shards.remote else np.linspace(0, shards.samples - 1, count).round().astype(int)
        shards[int(chosen[0])]
        names = next((found for found in shards.classes.values() if len(found) == classes), [])
        return Images(count, shards.samples, "", names, data, shards, chosen.tolist())
    except Fault as fault:
        why = str(fault)
    except (InputError, RemoteError, OSError) as error:
        why = str(error)
    return Images(min(most or 64, 64), 0, why, [], data, None, [])


def preprocessing(data: recipe.Data, class_names: list[str], classes: int) -> dict:
    """What preprocessing.json holds."""
    return {
        "input": {"name": "images", "layout": "NCHW", "type": "float32", "channels": "RGB"},
        "image_size": data.image_size,
        "resize": data.resize or data.image_size,
        "interpolation": "bilinear",
        "crop": "center",
        "mean": list(data.mean),
        "std": list(data.std),
        "background": list(data.background),
        "exif": data.exif,
        "class_names": class_names or [str(number) for number in range(classes)],
    }


def data_of(how: dict, **more) -> recipe.Data:
    """The part of a recipe that preprocessing.json holds, beside `more`. Raises ValueError, LookupError or TypeError."""
    own = {key: how[key] for key in ("image_size", "resize", "mean", "std", "background", "exif")}
    return recipe.Data.model_validate_json(json.dumps({"train": "none", "val": "none", "global_batch": 1} | more | own))


def preprocessed(encoded: bytes, data: recipe.Data) -> np.ndarray:
    """float32 (1, 3, H, W) of an encoded image, as an evaluation has it. Raises ImageError."""
    pixels, _ = Transform(data, 0, train=False)(encoded, 0, 0)
    # A copy, since an image that EXIF has turned is a view.
    return normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], data.mean, data.std).numpy()
