"""Small data sets in the formats of the true ones, for data_tools.make_shards."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

Truth = dict[str, tuple[np.ndarray, np.ndarray]]
"""Images (N, height, width, 3) and labels (N,) of each split."""

FASHION_MNIST = {"train": ("train", 12), "val": ("t10k", 5)}
"""In place of data_tools.fashion_mnist.FILES."""

CIFAR10_RECORDS = 6
"""In place of data_tools.cifar10.RECORDS."""

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def unpack(archive: Path, folder: Path) -> None:
    # Python 3.11 before its fourth release knows no filters.
    filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as tar:
        tar.extractall(folder, **filters)


def fashion_mnist(folder: Path) -> Truth:
    """Write idx files to the new `folder`, training files gzipped and validation files not. Returns what they hold."""
    folder.mkdir()
    rng, truth = np.random.default_rng(0), {}
    for split, (prefix, count) in FASHION_MNIST.items():
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            suffix = ".gz" if split == "train" else ""
            (folder / f"{prefix}-{name}-ubyte{suffix}").write_bytes(gzip.compress(content) if suffix else content)
        truth[split] = np.repeat(images[..., None], 3, axis=3), labels
    return truth


def cifar10(folder: Path) -> Truth:
    """Write CIFAR-10's binary version, of CIFAR10_RECORDS records a file, to the new `folder`. Returns its content."""
    folder.mkdir()
    rng, each = np.random.default_rng(1), CIFAR10_RECORDS
    images, labels = rng.integers(0, 256, (6 * each, 32, 32, 3), np.uint8), rng.integers(0, 10, 6 * each).astype(np.uint8)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = slice(each * i, each * i + each)
        planes = images[part].transpose(0, 3, 1, 2).reshape(each, 3072)
        (folder / f"{name}.bin").write_bytes(np.concatenate([labels[part, None], planes], axis=1).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_CLASSES) + "\n\n")
    return {"train": (images[: 5 * each], labels[: 5 * each]), "val": (images[5 * each :], labels[5 * each :])}


def archived(folder: Path, prefix: str = "cifar-10-batches-bin/", name: str = "cifar-10-binary.tar.gz") -> Path:
    """The files of `folder` as a tar.gz beside it, in another order than they are read in."""
    path = folder.parent / name
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(folder.iterdir(), reverse=True):
            tar.add(file, prefix + file.name)
    return path


def imagenet(folder: Path, classes: int = 10) -> None:
    """Write folders of JPEGs of many sizes to `folder`, two a class for training, one for validation. As in ImageNet one is grey,
    one is CMYK, and one is a PNG for all that its name says."""
    rng = np.random.default_rng(2)
    for split, count in (("train", 2), ("val", 1)):
        for c in range(classes):
            name = f"n{1440764 + 7919 * c:08d}"
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(30, 200, 2)
                pixels = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
                mode, kind = {(0, 0): ("L", "JPEG"), (1, 0): ("CMYK", "JPEG"), (2, 0): ("RGB", "PNG")}.get((c, i), ("RGB", "JPEG"))
                pixels.convert(mode).save(folder / split / name / f"{name}_{i}.JPEG", kind)


WORDS = {"n01440764": "tench, Tinca tinca", "n02012849": "crane", "n03126707": "crane", "n15075141": "toilet tissue"}
"""Four of ImageNet's classes, two of them of one name."""

ILSVRC_IDS = {"n03126707": 1, "n01440764": 2, "n15075141": 3, "n02012849": 4}
"""Which are in no order, as in the devkit."""


def imagenet_tars(folder: Path, each: int = 60) -> tuple[dict[str, bytes], list[tuple[str, bytes, str]]]:
    """Write ILSVRC2012_img_train.tar, a tar of a tar for each class, ILSVRC2012_img_val.tar and the devkit to the new `folder`,
    with a grey image, a CMYK one, a PNG by a JPEG's name, and two that cannot be used: n01440764_8.JPEG, which is cut short, and
    n01440764_9.JPEG, which is empty. Returns each training image by its name and, in order, those for validation with their
    names and WordNet ids."""
    folder.mkdir()
    rng, train = np.random.default_rng(3), {}
    special = {0: ("L", "JPEG"), 1: ("CMYK", "JPEG"), 2: ("RGB", "PNG")}
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in sorted(WORDS, reverse=True):
            content = {f"{wnid}_{i}.JPEG": _encoded(rng, *special.get(i, ("RGB", "JPEG"))) for i in range(each)}
            if wnid == "n01440764":
                content[f"{wnid}_8.JPEG"], content[f"{wnid}_9.JPEG"] = content[f"{wnid}_8.JPEG"][:-200], b""
            _add(outer, f"{wnid}.tar", _tar(content))
            train |= content
    wnids = [sorted(WORDS)[i] for i in rng.integers(0, len(WORDS), 12)]
    val = [(f"ILSVRC2012_val_{i:08d}.JPEG", _encoded(rng, "RGB", "JPEG"), wnid) for i, wnid in enumerate(wnids, 1)]
    (folder / "ILSVRC2012_img_val.tar").write_bytes(_tar({name: image for name, image, _ in val}))
    truth = "".join(f"{ILSVRC_IDS[wnid]}\n" for wnid in wnids).encode()
    data = "ILSVRC2012_devkit_t12/data"
    devkit = {f"{data}/ILSVRC2012_validation_ground_truth.txt": truth, f"{data}/meta.mat": _meta()}
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(_tar(devkit)))
    return train, val


def _encoded(rng: np.random.Generator, mode: str, kind: str) -> bytes:
    height, width = rng.integers(12, 40, 2)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode).save(out, kind)
    return out.getvalue()


def _tar(content: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in content.items():
            _add(tar, name, data)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _meta() -> bytes:
    from scipy.io import savemat

    fields = [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    rows = [(identity, wnid, WORDS[wnid], "", 0) for wnid, identity in ILSVRC_IDS.items()]
    # A group of classes, which the devkit has too.
    rows.append((1001, "n00001740", "entity", "", 4))
    out = io.BytesIO()
    savemat(out, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    return out.getvalue()
