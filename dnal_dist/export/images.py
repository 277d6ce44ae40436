"""Images for the proof, and the preprocessing of an export: what the evaluation of a recipe does to an image, as data."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.data.decoding import check_size, decode, read_header
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


def preprocessed(encoded: bytes, how: dict, max_pixels: int = 100_000_000) -> np.ndarray:
    """float32 (3, H, W) of an encoded image, as preprocessing.json says, by Pillow and NumPy. Raises ImageError."""
    header = read_header(encoded, how["exif"])
    check_size((header.height, header.width), max_pixels)
    image = Image.fromarray(decode(encoded, header, background=tuple(how["background"])))
    shorter, longer, size = min(image.size), max(image.size), how["image_size"]
    longer = int(how["resize"] * longer / shorter)
    shape = (how["resize"], longer) if image.width <= image.height else (longer, how["resize"])
    check_size(shape[::-1], max_pixels)
    image = image if image.size == shape else image.resize(shape, Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    mean, std = (np.array(how[key], dtype=np.float32) for key in ("mean", "std"))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))
