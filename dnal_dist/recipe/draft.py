"""A first recipe for a set of shards: commented, and meant to train well as it stands."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import yaml

from dnal_dist.common.errors import InputError, reason
from dnal_dist.common.files import read_regular
from dnal_dist.common.text import printable
from dnal_dist.recipe.loading import load

MOST_BYTES = 256 << 20
# torchvision's name of the weights of our networks.
WEIGHTS = {"vgg16_imagenet": "vgg16_bn", "resnet50_imagenet": "resnet50", "mobilenetv2_imagenet": "mobilenet_v2"}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Images of a step, for fewer training images than this.
BATCHES = (1000, 16), (4000, 32), (20_000, 64), (200_000, 128), (1 << 62, 256)
# Iterations that a phase should have about, and its fewest and most epochs, with published weights and without.
PHASES = {
    "pretrain": {True: (1500, 3, 20), False: (8000, 10, 120)},
    "search": {True: (1500, 3, 15), False: (4000, 6, 40)},
    "finetune": {True: (3000, 6, 40), False: (8000, 16, 120)},
}


class Images(NamedTuple):
    """What a network wants its images to be."""

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    weights: str | None = None
    """The value of model.init_from, for whoever publishes weights."""


def draft(name: str, data: Path, model: str, budget: str, image_size: int | None = None, scratch: bool = False) -> str:
    """The text of a recipe called `name` for the shards in the folder `data`. budget: as architecture.target.macs. image_size: if
    not what the network was published for; scratch: without published weights.

    Raises InputError for what is missing.
    """
    (train, val, classes), wanted = _counts(data), _images(model, image_size, scratch)
    batch = next(size for most, size in BATCHES if train < most)
    batch = min(batch, max(2, train // 2))
    tuned = wanted.weights is not None
    epochs = {phase: _epochs(train // batch, *lengths[tuned]) for phase, lengths in PHASES.items()}
    # 0.1 at 256 images from the beginning; a tenth of it is enough to move weights that are good already.
    rate = float(f"{(0.02 if tuned else 0.1) * max(batch, 32) / (64 if tuned else 128):.1g}")
    crop = {"kind": "resized_crop", "scale": [0.35, 1.0], "flip": True}
    small = {"kind": "pad_crop", "padding": max(1, wanted.size // 8), "flip": True}
    values = {
        "name": name,
        "train": _pattern(data, "train"),
        "val": _pattern(data, "val"),
        "model": model,
        "quoted": json.dumps(model) if ":" in model else model,
        "classes": classes,
        "weights": _weights(model, wanted),
        "size": wanted.size,
        "resize": round(wanted.size / 0.875) if wanted.size >= 64 else wanted.size,
        "mean": list(wanted.mean),
        "std": list(wanted.std),
        "augmentation": yaml.safe_dump(crop if wanted.size >= 64 else small, default_flow_style=True, sort_keys=False).strip(),
        "batch": batch,
        "rate": rate,
        "decay": "1e-4" if tuned else "5e-4",
        "budget": budget,
        "round_to": 8 if wanted.size >= 64 else 1,
        **{phase: epochs[phase] for phase in PHASES},
        "warmup": 1 if tuned else min(5, epochs["pretrain"]),
        "train_count": train,
        "val_count": val,
    }
    return TEXT.format(**values)


def write(path: Path, text: str) -> None:
    """Write a draft to `path`, once it is known to be a valid recipe. Raises InputError; an existing file stays."""
    try:
        with path.open("x") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; name another file, as in --new {path.stem}2.yaml") from None
    try:
        load(path)
    except InputError:
        path.unlink()
        raise


def _counts(data: Path) -> tuple[int, int, int]:
    """Training images, validation images and classes of the shards in a folder, by its index."""
    where = data / "index.json"
    try:
        content = json.loads(read_regular(where, MOST_BYTES))
        entries = [(str(entry["file"]), int(entry["samples"])) for entry in content["shards"]]
        classes = len(content["classes"])
    except FileNotFoundError:
        raise InputError(f"--data {data}: no index.json in it; make_shards or data_tools.index makes one") from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: not an index of shards ({reason(error)}); make it again") from None
    counts = {split: sum(samples for file, samples in entries if file.startswith(f"{split}-")) for split in ("train", "val")}
    if empty := next((split for split, count in counts.items() if not count), None):
        raise InputError(f"{where}: lists no shard {empty}-*.tar; name the shards so, or write data.train and data.val by hand")
    if counts["train"] < 4 or classes < 2:
        raise InputError(f"{where}: {counts['train']} training images of {classes} classes are too few")
    return counts["train"], counts["val"], classes


def _pattern(data: Path, split: str) -> str:
    """The value of data.train or data.val, as YAML."""
    plain = re.fullmatch(r"[\w./-]+", str(data))
    return f"{data}/{split}-*.tar" if plain else json.dumps(f"{shlex.quote(str(data))}/{split}-*.tar")


def _epochs(per_epoch: int, steps: int, least: int, most: int) -> int:
    return min(most, max(least, round(steps / max(1, per_epoch))))


def _images(model: str, size: int | None, scratch: bool) -> Images:
    library, _, own = model.partition(":")
    if library == "timm" and own:
        found = _of_timm(own)
    elif (library == "torchvision" and own) or model in WEIGHTS:
        found = _of_torchvision(own or WEIGHTS[model])
    elif model.endswith("_cifar"):
        found = Images(32)
    elif model.endswith("_digits"):
        found = Images(28)
    else:
        found = Images(224, *IMAGENET) if model == "proxyless_supernet" else Images(0)
    if not (size or found.size):
        raise InputError(f"--model {printable(model)}: the size of its images is not known; give it by --image-size")
    if scratch:
        found = Images(found.size)
    return found._replace(size=size or found.size)


def _of_timm(name: str) -> Images:
    try:
        from timm.models import get_pretrained_cfg, is_model
    except ImportError:
        raise InputError(f"--model timm:{name}: needs timm; pip install 'dnal-dist[timm]'") from None
    if not is_model(name.partition(".")[0]):
        raise InputError(f"--model timm:{printable(name)}: timm has no such network; `timm.list_models()` names what it has")
    known = get_pretrained_cfg(name)
    if known is None:
        return Images(224, *IMAGENET)
    published = bool(known.url or known.hf_hub_id)
    return Images(known.input_size[-1], known.mean, known.std, f"timm:{name}" if published else None)


def _of_torchvision(name: str) -> Images:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise InputError(
            f"--model torchvision:{printable(name)}: torchvision has no such network; `torchvision.models.list_models()` names "
            "what it has"
        )
    weights = models.get_model_weights(name).DEFAULT
    how = weights.transforms()
    return Images(how.crop_size[0], tuple(how.mean), tuple(how.std), f"torchvision:{name}")


def _weights(model: str, wanted: Images) -> str:
    if wanted.weights is None:
        return "  # It begins with random weights. `python -m data_tools.verify` proposes mean and std, below, for your images.\n"
    line = "pretrained: true" if wanted.weights == model else f"init_from: {wanted.weights}"
    return f"  {line}  # published weights, downloaded once; the last layer begins with random ones\n"


TEXT = """\
# {train_count:,} training and {val_count:,} validation images of {classes} classes, with {budget} of the MACs of {model}.
#
#   python -m dnal_dist.train {name}.yaml
#   python -m dnal_dist.export runs/{name}
#
# docs/recipe.md lists every key.
name: {name}
seed: 0
output: runs/{name}
model:
  name: {quoted}
  num_classes: {classes}
{weights}data:
  train: {train}
  val: {val}
  image_size: {size}
  resize: {resize}  # validation: the shorter side, before image_size is cut from its centre
  mean: {mean}
  std: {std}
  augmentation: {augmentation}
  exif: true  # photographs of phones are turned as their EXIF says
  global_batch: {batch}  # over all processes; the learning rates below go with it
  # per_device_batch_limit: 16  # if the device has too little memory: micro-batches of so many images
  workers: 4
phases:
  # The full network on your images.
  pretrain:
    epochs: {pretrain}
    optimizer: {{lr: {rate}, nesterov: true, weight_decay: {decay}, decay_norms: false}}
    schedule: {{kind: cosine, warmup: {warmup}}}
    label_smoothing: 0.1
    ema: 0.999  # a moving average of the weights is what is evaluated and goes on
  # Weights and gates in turn: three steps of the weights to one of the gates.
  search:
    epochs: {search}
    optimizer: {{lr: {rate}, nesterov: true, weight_decay: {decay}, decay_norms: false}}
    weight_steps: 3
    label_smoothing: 0.1
  # The compact network.
  finetune:
    epochs: {finetune}
    optimizer: {{lr: {rate}, nesterov: true, weight_decay: {decay}, decay_norms: false}}
    schedule: {{kind: cosine}}
    label_smoothing: 0.1
    ema: 0.999
  # Search and finetune learn also from the network as pretrain left it.
  distillation: {{weight: 0.5, temperature: 2.0}}
architecture:
  target: {{macs: {budget}}}  # 300M or 1.2G are MACs in numbers, {{params: 2M}} counts parameters
  criterion: taylor  # channels close in rounds, by the gradients of their gates; alpha is the method's own, with what follows
  # Gates that harden gently, and a price that goes with the square root of what a channel costs, suit budgets.
  optimizer: {{lr: 0.05}}
  delta_start: 3
  delta_final: 30
  penalty: root_macs
  round_to: {round_to}  # each layer keeps a multiple of so many channels, at which runtimes are fast
tracking: {{tracker: none}}  # or wandb, tensorboard, mlflow
"""
