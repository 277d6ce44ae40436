"""Decoded images of a small set, kept in memory that the loader processes of a split share, so that each is decoded once a run."""

import mmap
import multiprocessing
import struct
from typing import NamedTuple

import numpy as np

from dnal_dist.data.decoding import Header
from dnal_dist.recipe import Data

# Height and width of the image as a header has them, height and width of the pixels, label, alpha, bytes of the key.
_HEAD = struct.Struct("<4Iq?I")
# Bytes of a sample beside its pixels, with a key of some length.
BESIDE = _HEAD.size + 64
# JPEGs of photographs decode to nine times their bytes or more.
GROWTH = 8


class KeptImage(NamedTuple):
    key: str
    label: int
    header: Header
    pixels: np.ndarray
    """uint8 (height, width, 3), not to be written to."""


class Kept:
    """The images of `samples` samples, by their number: at most `limit` bytes, and none is removed once it is there.

    The memory is reserved now and filled as images are put there, by this process and those that it forks. A copy that is pickled
    keeps nothing.
    """

    def __init__(self, samples: int = 0, limit: int = 0):
        self.lock, self.used = multiprocessing.Lock(), multiprocessing.RawValue("q")
        try:
            self.memory, places = mmap.mmap(-1, max(1, limit)), mmap.mmap(-1, max(8, 8 * samples))
        except OSError:  # where the system lets no process reserve as much
            self.memory, places, samples, limit = b"", bytes(8), 0, 0
        self.limit = limit
        # Where the sample with each number begins, counted from 1; 0: it is not there.
        self.places = np.frombuffer(places, np.int64, samples)

    def __reduce__(self):
        return Kept, ()

    def put(self, index: int, image: KeptImage) -> None:
        """Keep a copy of sample number `index`, if there is room left for it."""
        if index >= len(self.places):
            return
        key = image.key.encode("utf-8", "surrogatepass")
        own, shape = image.header[:2], image.pixels.shape[:2]
        head = _HEAD.pack(*own, *shape, image.label, image.header.alpha, len(key))
        size = len(head) + len(key) + image.pixels.size
        with self.lock:
            begin = self.used.value
            if self.places[index] or begin + size > self.limit:
                return
            self.used.value = begin + size
            self.memory[begin : begin + size] = head + key + image.pixels.tobytes()
        # A second time, so that no processor shows its place to another process before its pixels.
        with self.lock:
            self.places[index] = begin + 1

    def get(self, index: int) -> KeptImage | None:
        place = int(self.places[index]) if index < len(self.places) else 0
        if not place:
            return None
        height, width, *shape, label, alpha, length = _HEAD.unpack_from(self.memory, place - 1)
        begin = place - 1 + _HEAD.size
        key = self.memory[begin : begin + length].decode("utf-8", "surrogatepass")
        pixels = np.frombuffer(self.memory, np.uint8, shape[0] * shape[1] * 3, begin + length).reshape(*shape, 3)
        return KeptImage(key, label, Header(height, width, "", alpha=alpha), pixels)


def kept_for(samples: int, encoded: int, data: Data, whole: bool) -> Kept:
    """What keeps the images of a set of `samples` samples, `encoded` bytes in all, if they fit into data.decoded_gb; else nothing.
    whole: not only the square of data.image_size of each."""
    limit = int(data.decoded_gb * 1e9)
    size = GROWTH * encoded if whole else samples * (BESIDE + 3 * data.image_size**2)
    return Kept(samples, limit if whole else size) if size <= limit else Kept()
