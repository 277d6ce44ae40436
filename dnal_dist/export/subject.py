"""What is evaluated: the network of a run or a file of an export, on the images of shards, by all processes together."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.common.files import read_regular
from dnal_dist.data.classes import refuse_conflicts
from dnal_dist.data.images import normalise
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.shards import Shards
from dnal_dist.distributed.context import Context
from dnal_dist.export.evaluation import Tally
from dnal_dist.export.images import data_of
from dnal_dist.export.prediction import MOST_JSON, Model
from dnal_dist.nets import compact


@dataclass
class Subject:
    run: Callable[[Tensor], np.ndarray]
    """float32 images (n, 3, H, W) on the CPU -> logits (n, classes)."""
    data: recipe.Data
    stream: Stream
    context: Context
    is_run: bool
    runtime: str
    classes: int

    @property
    def names(self) -> list[str]:
        """Of the classes, as the shards call them, or else by their numbers."""
        named = (found for found in self.stream.shards.classes.values() if len(found) == self.classes)
        return next(named, [str(number) for number in range(self.classes)])

    @torch.no_grad()
    def tally(self) -> Tally | None:
        """What the network makes of all images; None in all processes but the main one."""
        console, own = Console(stderr=True), Tally(np.zeros((self.classes, self.classes), dtype=np.int64))
        with Progress(console=console, disable=not (console.is_terminal and self.context.main), transient=True) as bar:
            task = bar.add_task("evaluating", total=self.stream.samples / self.context.world_size)
            for batch in self.stream.batches():
                own.skipped += map(str, batch.bad)
                if len(batch.labels):
                    own.add(batch, self.run(normalise(batch.images, self.data.mean, self.data.std)))
                bar.advance(task, len(batch.labels) + len(batch.bad))
        context = self.context
        confusion = context.sum_(torch.from_numpy(own.confusion).to(context.device, torch.float64)).cpu().numpy()
        top5 = int(context.sum_(torch.tensor([own.top5], dtype=torch.float64, device=context.device)).item())
        whole = Tally(confusion.round().astype(np.int64), top5, context.gather(own.skipped))
        whole.keep(context.gather(own.mistakes))
        return whole if context.main else None


def opened(path: Path, runtime: str | None, shards: str | None) -> Subject:
    """The network of a run (runtime None), or a file of an export, on `shards` or else the recipe's validation set. Raises
    InputError."""
    is_run = (path / "recipe.yaml").exists()
    export = path / "export" if is_run else path
    context = Context()
    if is_run and runtime is None:
        settings = recipe.load(path / "recipe.yaml")
        network = compact_of(path).to(context.device)
        run, name, names = (lambda images: network(images.to(context.device)).cpu().numpy()), "torch", None
    else:
        model = Model(export, runtime)
        settings = recipe_of(export / "manifest.json", model.how)
        run, name = (lambda images: model.run(images.numpy())), model.file
        names = model.how["class_names"]
    data = settings.data if shards is None else settings.data.model_copy(update={"val": shards})
    with torch.no_grad():
        classes = run(torch.zeros(1, 3, data.image_size, data.image_size)).shape[1]
    found = Shards(data.val, "data.val" if shards is None else "--shards", classes, data)
    if names is not None and names != [str(number) for number in range(classes)]:  # an export without names has those
        refuse_conflicts({f"{export}/preprocessing.json": names, **found.classes})
    stream = Stream(found, data, settings.seed, False, context.rank, context.world_size)
    return Subject(run, data, stream, context, is_run, name, classes)


def compact_of(run: Path) -> nn.Module:
    """The compact network of a run, in eval mode. Raises InputError."""
    if not (run / "compact").exists():
        raise InputError(f"{run}: there is no compact network yet; the run has not finished")
    return compact.load(run / "compact")


def recipe_of(path: Path, how: dict) -> recipe.Recipe:
    """The recipe that an export's manifest names, with the preprocessing of the export. Raises InputError."""
    try:
        found = json.loads(read_regular(path, MOST_JSON))["provenance"]["recipe"]
        settings = recipe.Recipe.model_validate_json(json.dumps(found))
        return settings.model_copy(update={"data": data_of(how, **settings.data.model_dump(mode="json"))})
    except ValidationError as error:
        raise InputError(f"{path}: its recipe is none ({recipe.faults(error, recipe.Recipe)})") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path}: not the manifest of an export; export the run again") from None
