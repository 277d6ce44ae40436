"""Recipes as pydantic models: every key, its type, default and meaning."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dnal_dist.common.paths import expanded
from dnal_dist.recipe.learning import ArchitectureSettings, Phases
from dnal_dist.recipe.section import FREE, FREE_AT_RESUME, FREE_IN_SETTING, OneLine, Section, one_line_each

# A path in which ~ and $VAR are expanded when the recipe is read.
Place = Annotated[OneLine, AfterValidator(expanded), Field(min_length=1)]


class Network(Section):
    name: OneLine
    """Network to train: a name of dnal_dist.nets (vgg_digits, resnet56_cifar, vgg16_imagenet, ...), torchvision:NAME, timm:NAME,
    compact:RUN (the compact network of a finished run, with its weights), or PACKAGE.MODULE:FUNCTION, which returns a
    torch.nn.Module."""
    num_classes: int | None = Field(None, ge=2, le=1_000_000)
    """Classes to tell apart; the network's own default if absent."""
    width: float = Field(1.0, gt=0, le=16)
    """Factor of all channel counts, rounded to multiples of 2 (MobileNetV2, supernet: 8, and their last convolution only grows)."""
    arguments: dict[OneLine, Annotated[bool | int | float | str | list | None, AfterValidator(one_line_each)]] = Field({})
    """What torchvision, timm or the function is called with, beside num_classes."""
    ignore: list[OneLine] = Field([])
    """Module paths of such a network whose output channels all stay."""
    pretrained: bool = False
    """Begin with the weights that torchvision or timm publishes for the network: init_from with its own name."""
    init_from: Place | None = None
    """Weights and BatchNorm statistics to begin with, instead of random ones: torchvision:NAME or timm:NAME (of vgg16_imagenet,
    resnet50_imagenet, mobilenetv2_imagenet: torchvision:vgg16_bn, :resnet50, :mobilenet_v2), a run folder, a checkpoint's folder,
    or a .safetensors file with our names or torchvision's. It is not read on a resume."""

    @model_validator(mode="before")
    @classmethod
    def _pretrained_is_a_source(cls, values):
        if isinstance(values, dict) and values.get("pretrained") is True:
            name = values.get("name")
            if not str(name).startswith(("torchvision:", "timm:")):
                raise ValueError(f"pretrained: nobody publishes weights of {name}; give init_from")
            if values.get("init_from") not in (None, name):
                raise ValueError("pretrained and init_from name two sources of weights; give one")
            return {**values, "init_from": name}
        return values


class Augmentation(Section):
    kind: Literal["none", "pad_crop", "resized_crop"] = "none"
    """none: resize and centre crop. pad_crop: pad with `padding` pixels, crop at random (CIFAR, digits). resized_crop: a random
    part of the image of `scale` of its area and aspect 3/4 to 4/3, resized (ImageNet)."""
    padding: int = Field(4, ge=0)
    """Pixels added on each side by pad_crop."""
    scale: tuple[float, float] = Field((0.08, 1.0), strict=False)
    """Smallest and largest fraction of the image's area that resized_crop takes."""
    resize: int | None = Field(None, ge=1)
    """The shorter side is resized to this before resized_crop takes its part; by default the image stays as it is."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""

    repeats: int = Field(1, ge=1)
    """Each image is in its batch so often, each time with other random changes (arXiv 1901.09335). An epoch has as many iterations
    as without, so each image is in one of so many epochs."""
    policy: Literal["none", "trivial_augment", "rand_augment"] = "none"
    """Random changes of colours and shapes behind the crop, torchvision's TrivialAugmentWide or RandAugment."""
    operations: int = Field(2, ge=1, le=14)
    """Changes that rand_augment makes to an image, one after the other."""
    magnitude: int = Field(9, ge=0, le=30)
    """How strong those of rand_augment are."""
    erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a random rectangle of an image is replaced by `data.mean` (arXiv 1708.04896)."""

    @model_validator(mode="after")
    def _scale_is_a_range(self):
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale must be two fractions with 0 < smallest <= largest <= 1")
        return self


Channel = Annotated[int, Field(ge=0, le=255)]


def _checked_sampling(given: str | list[float]) -> str | list[float]:
    shares = isinstance(given, list) and all(type(one) in (int, float) and 0 <= one < 1e9 for one in given) and any(given)
    if not shares and given not in ("uniform", "balanced"):
        raise ValueError(f"expected uniform, balanced, or a share for each class such as [1, 1, 2], found {given!r}")
    return given


class Data(Section):
    train: OneLine = Field(json_schema_extra=FREE_AT_RESUME)
    """Training shards: a path with * ? [] and {000..007} patterns; several, separated by blanks; a path with
    blanks wants quotes. Also https://, s3:// and gs://."""
    val: OneLine = Field(json_schema_extra=FREE_AT_RESUME)
    """Validation shards, likewise."""
    image_size: int = Field(ge=1)
    """Height and width of the images the network sees, in pixels."""
    resize: int | None = Field(None, ge=1)
    """Validation, and training without augmentation: the shorter side is resized to this, then image_size is cropped from the
    centre; default image_size."""
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), strict=False)
    """Per-channel mean (RGB, images in 0..1) subtracted on the device."""
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (0.229, 0.224, 0.225), strict=False
    )
    """Per-channel standard deviation divided by, likewise."""
    augmentation: Augmentation = Augmentation()
    """Random changes to training images."""
    global_batch: int = Field(ge=1)
    """Images of one step, over all processes together."""
    per_device_batch_limit: int | None = Field(None, ge=1)
    """Images that a device has memory for. A larger local batch is divided into the fewest equal micro-batches that fit, which are
    taken one after the other and synchronise once."""
    shuffle_shards: int | None = Field(None, ge=1)
    """Training shards in use at any time, about. By default all: a uniform shuffle over the whole set, which reads all over it.
    With a number (such as 32) shards come and go, for sets that do not fit into a cache; their samples should have been shuffled
    when the shards were made."""
    sampling: Annotated[Literal["uniform", "balanced"] | list[float], BeforeValidator(_checked_sampling)] = "uniform"
    """How often an epoch, whose length stays, has the training images. uniform: each once. balanced: so often that all classes come
    alike, images of the rare ones several times, with other random changes, and of the frequent ones not all. A list: the share of
    each class, such as [1, 1, 2]. The latter want labels in index.json."""
    workers: int = Field(2, ge=0, json_schema_extra=FREE)
    """Loader processes for each training process, no more than it has cores; 0 loads in the training process itself."""
    cache: OneLine = Field("~/.cache/dnal_dist/shards", min_length=1, json_schema_extra=FREE)
    """Folder of this machine for copies of remote shards; its processes share it. As in `train` and `val`, ~ and $VAR are those of
    the machine that reads the shards."""
    cache_gb: float = Field(100.0, gt=0, json_schema_extra=FREE)
    """Bound of that folder, in GB of 1e9 bytes; the copies used least recently make room."""
    decoded_gb: float = Field(1.0, ge=0, json_schema_extra=FREE)
    """Memory of each training process for the decoded images of each split, in GB of 1e9 bytes. A set that fits is decoded once,
    and loader processes share it; 0: images are decoded each time."""
    label_key: OneLine | None = Field(None, min_length=1)
    """Key of the samples' .json members whose value is the label; by default the label is the text of .cls, .cls.txt or .txt, the
    first of them that a sample has. A label is the number of a class, or its name in the index of the shards."""
    image: OneLine | None = Field(None, min_length=1)
    """What follows the key's dot in the name of a sample's image, such as crop2.png; by default png, jpg, jpeg, webp, bmp, tif or
    tiff. With several images in a sample it must be named."""
    label: OneLine | None = Field(None, min_length=1)
    """Likewise of its label, such as cls; by default the first of cls, cls.txt and txt (json with label_key)."""
    background: tuple[Channel, Channel, Channel] = Field((255, 255, 255), strict=False)
    """Colour (RGB, 0 to 255) that shows through where an image is transparent."""
    exif: bool = False
    """Turn images as the orientation in their EXIF says; by default pixels stay as they are stored."""
    decode: Literal["cpu", "cuda"] = "cpu"
    """Where training JPEGs are decoded: by the loader processes, or by nvJPEG on the GPU that trains. Validation and whatever is
    no plain JPEG is decoded by the loader processes in either case."""
    max_pixels: int = Field(100_000_000, ge=1)
    """Height times width beyond which an image is not decoded, however small its file; it is then skipped as one that fails to."""
    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    """Fraction of a set's samples that may be unusable; they are skipped, counted and named. Beyond it the run stops."""

    @model_validator(mode="after")
    def _policies_need_pixels(self):
        if self.decode == "cuda" and (self.augmentation.policy != "none" or self.augmentation.erasing):
            raise ValueError("'augmentation.policy' and 'erasing' are done by loader processes; set decode to cpu, or remove them")
        return self

    @model_validator(mode="after")
    def _batches_hold_the_order(self):
        if self.global_batch % self.augmentation.repeats:
            raise ValueError(f"'augmentation.repeats' ({self.augmentation.repeats}) must divide global_batch ({self.global_batch})")
        if self.sampling != "uniform" and self.shuffle_shards is not None:
            raise ValueError("'sampling' by class draws from all shards at any time; remove shuffle_shards, or sampling")
        return self

    @model_validator(mode="after")
    def _crop_fits(self):
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(f"resize ({self.resize}) must be at least image_size ({self.image_size}), which is cropped from it")
        return self


class Tracking(Section):
    log_every: int = Field(20, ge=1)
    """Iterations between two records of metrics.jsonl."""
    tracker: Literal["wandb", "tensorboard", "mlflow", "none"] = "wandb"
    """What receives the same metrics beside metrics.jsonl, through Accelerate's trackers. MLflow's server is what
    MLFLOW_TRACKING_URI names, else the run folder."""
    mode: Literal["offline", "online"] | None = None
    """W&B mode; by default what WANDB_MODE says, else online if an API key is found, else offline. Offline runs are sent later with
    `wandb sync`."""
    project: OneLine = "dnal_dist"
    """W&B project, or MLflow experiment."""
    latency_seconds: float = Field(3.0, ge=0)
    """At the run's end the latency of the compact network beside that of the full one is measured for so long, but for no more than
    a twentieth of the run's time, and not if that is below a second; 0: not at all."""
    plots: bool = True
    """Draw plots/*.svg and *.png at the run's end, which takes seconds; `python -m dnal_dist.report` does it at any time."""


class Training(Section):
    sync_batchnorm: bool = False
    """BatchNorm normalises with the statistics of all processes' batches instead of each its own."""
    activation_checkpointing: bool = Field(False, json_schema_extra=FREE_IN_SETTING)
    """Activations within a block are computed again in the backward pass instead of kept: less memory, a third more work."""
    compile: bool = False
    """Each block goes through torch.compile."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Layout of images, activations and, where the backend allows it, of convolution weights. auto: channels_last on a GPU, and on
    a CPU for networks with depthwise convolutions; else contiguous. Sums round differently in each, so a run keeps its own."""
    tf32: bool = True
    """On a GPU, convolutions and matrix products in float32 may round their factors to TF32 (10 bits of mantissa)."""
    cuda_graphs: bool = True
    """On a GPU, the passes of a step run as one CUDA graph where this can be: in a single process without torch.compile, activation
    checkpointing, float16 and micro-batches. Kernels need not wait for Python then."""
    skip_closed: bool = True
    """In a search by criterion taylor, channels that have closed are computed no more once 55 % of the MACs are left. No effect
    on FSDP2 and ZeRO-3, which share out the parameters, with `compile` and `activation_checkpointing`, and for networks that draw
    random numbers (dropout, stochastic depth) or have layers of unusual kinds; the run says why."""
    cudnn_benchmark: bool = False
    """On a GPU, cuDNN times its algorithms when it first meets a convolution, and keeps the fastest: seconds to minutes at the
    first step of each phase, for a few percent in the others."""


class Keep(Section):
    last: int = Field(2, ge=1)
    """The newest ones."""
    best: int = Field(1, ge=0)
    """Those of the highest validation accuracy in the newest phase."""


class Checkpoints(Section):
    every_minutes: float | None = Field(15.0, gt=0)
    """Minutes after which there is one, beside those at the end of each epoch and phase and at a stop; null: only those."""
    every_steps: int | None = Field(None, ge=1)
    """Iterations of the run after which there is one, likewise."""
    keep: Keep = Keep()
    """Which ones stay."""
    give_up_hours: float = Field(6.0, gt=0)
    """While checkpoints cannot be written, training goes on until the last good one is this old."""


class Recipe(Section):
    """A run of dnal_dist: pretrain, search, prune and finetune one network on one data set."""

    name: OneLine = Field(min_length=1, json_schema_extra=FREE_IN_SETTING)
    """What the run is called in the report and the trackers."""
    seed: int = Field(0, ge=0, lt=1 << 63, json_schema_extra=FREE_IN_SETTING)
    """Fixes the initial weights, the order of samples and their augmentation."""
    output: Place = Field(json_schema_extra=FREE)
    """The run folder. Here, as in every path of a recipe, ~ and $VAR are expanded."""
    model: Network
    """The network."""
    data: Data
    """Shards, transforms and batch size."""
    phases: Phases
    """How long each phase lasts and how its weights learn."""
    architecture: ArchitectureSettings
    """How the gates learn."""
    training: Training = Training()
    """Switches that trade time, memory and communication; they go with every backend."""
    checkpoint: Checkpoints = Field(Checkpoints(), json_schema_extra=FREE)
    """When where the run stands is saved."""
    tracking: Tracking = Field(Tracking(), json_schema_extra=FREE)
    """Where metrics go beside metrics.jsonl, and how often."""

    @model_validator(mode="after")
    def _the_teacher_has_learned(self):
        pretrain = self.phases.pretrain
        trained = pretrain.epochs or pretrain.steps or self.model.init_from or self.model.name.startswith("compact:")
        if self.phases.distillation is not None and self.phases.distillation.teacher is None and not trained:
            raise ValueError(
                "'phases.distillation' wants a teacher that has learned: 'phases.pretrain' has no iterations and 'model.init_from' "
                "names no weights; give one of the two, or 'phases.distillation.teacher', or phases.distillation=null"
            )
        return self

    @model_validator(mode="after")
    def _a_finetune_alone_has_a_network(self):
        if not self.searches and self.model.init_from is None and not self.model.name.startswith("compact:"):
            raise ValueError(
                "phases.search has no iterations, so a compact network is needed: give model.init_from, the folder of a finished "
                "run, or model.name=compact:RUN"
            )
        return self

    @property
    def searches(self) -> bool:
        """Whether the run learns an architecture, and does not only finetune a compact network."""
        return self.phases.search.iterations(1) > 0

    @property
    def network(self) -> dict:
        """What nets.build takes."""
        model = self.model
        settings = {"name": model.name, "num_classes": model.num_classes, "width": model.width, "image_size": self.data.image_size}
        return settings | {"arguments": model.arguments, "ignore": model.ignore, "streams": self.architecture.streams}


def free_keys(in_what: Literal["setting", "resume"], section: type[Section] = Recipe, head: str = "") -> set[str]:
    """Dotted keys that do not affect a run's result ("setting"), or that may change when it resumes ("resume"); a whole section by
    its name alone."""
    found = set()
    for name, field in section.model_fields.items():
        if in_what in (field.json_schema_extra or {}).get("free", ()):
            found.add(f"{head}{name}")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= free_keys(in_what, field.annotation, f"{head}{name}.")
    return found


def is_free(key: str, free: set[str]) -> bool:
    """Whether the dotted `key`, or a section that it is in, is one of `free`."""
    parts = key.split(".")
    return any(".".join(parts[:number]) in free for number in range(1, len(parts) + 1))


def flat(tree: dict, head: str = "") -> dict[str, object]:
    """The values of a recipe, or of a part of one, by their dotted keys."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= flat(value, f"{head}{key}.") if isinstance(value, dict) else {f"{head}{key}": value}
    return found
