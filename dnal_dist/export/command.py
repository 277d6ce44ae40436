"""The export of a run: files, their proof, and what there is to know about them."""

import contextlib
import datetime
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from dnal_dist import recipe
from dnal_dist.common import atomic
from dnal_dist.common.errors import InputError, reason, remedy
from dnal_dist.common.text import fewer, percent, spaced
from dnal_dist.export import files, proof
from dnal_dist.export.images import preprocessing, validation_images
from dnal_dist.export.program import program
from dnal_dist.export.readers import FILES
from dnal_dist.export.source import source
from dnal_dist.export.subject import compact_of
from dnal_dist.nets import compact
from dnal_dist.nets.narrow import Narrow
from dnal_dist.nets.whole import deployed
from dnal_dist.report import records, templates

# Version of the files manifest.json, preprocessing.json and architecture.json.
FORMAT = 1


class Options(NamedTuple):
    kinds: Sequence[str] = ("pt2", "onnx")
    """Of files.WRITERS, beside model.py and model.safetensors."""
    fold_bn: bool = False
    opset: int | None = None
    any_size: bool = False
    images: int | None = 1000
    """Images of the validation set that the proof takes; None for all."""
    hub: Path | None = None
    """Folder for what a model hub wants."""


def export(run: Path, options: Options, tell: Callable[[str], None] = lambda _: None) -> dict:
    """Write RUN/export, in place of what was there, and prove it; returns its manifest. tell: gets a line for each part.

    Raises InputError for a run that cannot be exported, and ProofError if a file is not the network of the run: then there is no
    RUN/export, or the one before.
    """
    made = _Export(run, options, tell)
    try:
        with atomic.folder(run / "export") as folder:
            try:
                manifest = made.describe(folder, made.prove(folder, made.write(folder)))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        if options.hub is not None:
            made.lay_out(run / "export")
    except OSError as error:
        raise InputError(f"{run}/export: cannot be written ({reason(error)}); {remedy(error)}") from None
    return manifest


class _Export:
    """The parts of an export, in the order in which they are done."""

    def __init__(self, run: Path, options: Options, tell: Callable[[str], None]):
        if not (run / "recipe.yaml").exists():
            raise InputError(f"{run}: holds no recipe.yaml, so it is not a run folder; give a run's `output`")
        self.options, self.tell = options, tell
        self.network = compact_of(run)
        self.settings, self.record = recipe.load(run / "recipe.yaml"), records.load(run)
        self.pruned, self.size = self.record.last("prune"), self.settings.data.image_size
        self.classes = self.settings.model.num_classes or self._classes()
        self.images = validation_images(self.settings, self.classes, options.images)
        self.notes = []
        if self.images.why:
            self.notes.append(f"drawn images, since the validation set cannot be read: {self.images.why}")
        if options.hub is not None and options.hub.exists():
            raise InputError(f"--hub {options.hub}: there is something already; name a new folder")

    @torch.no_grad()
    def _classes(self) -> int:
        return self.network(torch.zeros(2, 3, self.size, self.size)).shape[1]

    def write(self, folder: Path) -> list[str]:
        """The files of the network; their names, as readers open them."""
        options, size = self.options, self.size
        self.tell("reading the network")
        made = program(self.network, size, options.any_size)
        title = f"{self.settings.model.name}, pruned: images float32 (n, 3, {size}, {size}) as in preprocessing.json -> logits"
        try:
            files.write_torch(*source(made, self.network, title), folder)
        except ValueError as error:
            raise InputError(f"model.py: {error}") from None
        if options.fold_bn:
            made = program(self.network, size, options.any_size, fold=True)
        for kind in options.kinds:
            self.tell(f"writing {FILES[kind]}")
            files.WRITERS[kind](made, folder, options.opset)
        return ["model.py", *(FILES[kind] for kind in options.kinds)]

    def prove(self, folder: Path, written: list[str]) -> list[proof.Check]:
        """Checks that all hold. Raises ProofError."""
        self.tell(f"comparing {len(written)} files on {self.images.count} images")
        checks = []
        if "mask" not in self.pruned:
            self.notes.append("metrics.jsonl has no mask, so the masked network was not compared")
        elif isinstance(self.network, Narrow):  # of an older release, the layers have no names
            checks.append(proof.masked(self.settings, self.pruned["mask"], self.network, self.images))
        checks.append(proof.joined(self.network, self.images))
        checks += proof.prove(self.network, folder, written, self.images, self.options.any_size)
        for check in checks:
            if not check.holds:
                raise proof.ProofError(
                    f"{check.file}: its logits differ by {check.difference:.1e} of the largest, more than {check.limit:.0e} in "
                    f"{check.precision}, and the first class of {check.top1_differs} of {check.images} images"
                )
        return checks

    def describe(self, folder: Path, checks: list[proof.Check]) -> dict:
        """Write preprocessing.json, architecture.json, README.md and manifest.json; returns what is in the last."""
        settings, record, pruned, options = self.settings, self.record, self.pruned, self.options
        result, how = records.summary(record), preprocessing(settings.data, self.images.class_names, self.classes)
        sites = {site: {"channels": full, "kept": pruned.get("kept", {}).get(site)} for site, full in record.sites.items()}
        shape = {"format": FORMAT, "network": settings.model.name, "image_size": self.size, "classes": self.classes}
        costs = {"cost": {key: pruned[key] for key in ("full", "compact") if key in pruned}}
        _json(folder / "preprocessing.json", {"format": FORMAT, **how})
        # model.safetensors holds the network as it is deployed. Without what that adds at ends it often is the one that trained.
        own, made = self.network.state_dict(), deployed(self.network)
        first = compact.cut(made.state_dict(), {name: tensor.shape for name, tensor in own.items()})
        same = own.keys() == first.keys() and all(torch.equal(own[name], first[name]) for name in own)
        facts = {"mask": pruned.get("mask") if same else None, "description": compact.describe(self.network if same else made)}
        _json(folder / "architecture.json", {**shape, **costs, "sites": sites, **facts})
        start, end = record.last("start"), record.last("end")
        provenance = {
            "recipe": settings.model_dump(mode="json"),
            "seed": settings.seed,
            "code": start.get("code"),
            "versions": {**start.get("versions", {}), "exported_with": _versions()},
            "receipts": [{key: one[key] for key in ("epoch", "samples", "digest") if key in one} for one in record.of("receipt")],
            "usage": end.get("ledger"),
            "accuracy": result.get("accuracy", {}),
        }
        manifest = {
            "format": FORMAT,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "options": {"fold_bn": options.fold_bn, "opset": options.opset, "any_size": options.any_size},
            "proof": {
                "images": "validation set" if self.images.of else "drawn",
                "of": self.images.of,
                "checks": [{**check._asdict(), "limit": check.limit} for check in checks],
            },
            "notes": self.notes,
            "provenance": provenance,
        }
        (folder / "README.md").write_text(_card(settings, manifest, how, pruned, result), encoding="utf-8")
        manifest["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in sorted(folder.iterdir())
        }
        _json(folder / "manifest.json", manifest)
        return manifest

    def lay_out(self, folder: Path) -> None:
        """What a model hub wants in a repository: config.json as timm writes it, weights, code, and the card."""
        hub, how = self.options.hub, json.loads((folder / "preprocessing.json").read_text())
        size, classes = how["image_size"], how["class_names"]
        settings_of_images = {
            "input_size": [3, size, size],
            "fixed_input_size": not self.options.any_size,
            "interpolation": how["interpolation"],
            "crop_pct": size / how["resize"],
            "crop_mode": "center",
            "mean": how["mean"],
            "std": how["std"],
            "num_classes": len(classes),
        }
        config = {
            # Programs that build a network by this name would build the full one, into which the weights do not fit.
            "architecture": f"{self.settings.model.name.rpartition(':')[2].rpartition('/')[2]}_compact",
            "num_classes": len(classes),
            "label_names": classes,
            "pretrained_cfg": settings_of_images,
        }
        hub.parent.mkdir(parents=True, exist_ok=True)
        with atomic.folder(hub) as made:
            _json(made / "config.json", config)
            for name in ("model.safetensors", "model.py", "README.md", "preprocessing.json", "manifest.json"):
                shutil.copyfile(folder / name, made / name)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("dnal-dist", "torch", "onnx", "onnxruntime", "openvino", "executorch"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _card(settings: recipe.Recipe, manifest: dict, how: dict, pruned: dict, result: dict) -> str:
    costs = []
    if "full" in pruned and "compact" in pruned:
        for key, words in (("macs", "MACs"), ("params", "parameters")):
            full, now = pruned["full"]["exact"][key], pruned["compact"]["exact"][key]
            costs.append((words, spaced(full), spaced(now), fewer(now / max(full, 1))))
    accuracy = result.get("accuracy", {}).get("finetune")
    return templates.render(
        "card.md",
        title=settings.name,
        network=settings.model.name,
        classes=len(how["class_names"]),
        size=settings.data.image_size,
        resize=how["resize"],
        accuracy=None if accuracy is None else percent(accuracy, 2),
        accuracy_number=accuracy,
        costs=costs,
        proof=manifest["proof"],
        notes=manifest["notes"],
        files=sorted({check["file"] for check in manifest["proof"]["checks"]} - {"masked network", "deployment form"}),
    )
