"""How weights and gates learn: optimisers, schedules, phases, and the architecture's target."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dnal_dist.common.paths import expanded
from dnal_dist.recipe.section import OneLine, Section


class SGD(Section):
    kind: Literal["sgd", "rmsprop", "adam", "adamw", "radam"] = "sgd"
    """Torch's optimizers that every backend can hold. All but sgd want rates smaller by a factor of about 100; the last three go on
    with one another's means from phase to phase. alpha takes sgd, with whose steps the control of a budget reckons."""
    lr: float = Field(gt=0)
    """Base learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field((0.9, 0.999), strict=False)
    """Decays of the means of the gradient and of its square, all but sgd; rmsprop has the latter only."""
    eps: float = Field(1e-8, gt=0)
    """What is added to the root of the latter."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the last update that the next one goes on with; of sgd and rmsprop."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    weight_decay: float = Field(0.0, ge=0)
    """L2 weight decay; of adamw decoupled from the gradient (arXiv 1711.05101)."""
    decay_norms: bool = True
    """Whether weight decay also shrinks parameters of one dimension: BatchNorms and biases. Nothing else in the architecture's."""
    clip_norm: float | None = Field(None, gt=0)
    """A gradient whose norm, over all of this group, is larger is scaled down to it."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self):
        if self.nesterov and self.kind != "sgd":
            raise ValueError(f"nesterov is a form of SGD's momentum; leave it out with {self.kind}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Schedule(Section):
    warmup: float = Field(0.0, ge=0)
    """Over so long, in the unit of the phase's duration, the learning rate rises in equal steps to what the schedule says."""


class Constant(Schedule):
    kind: Literal["constant"] = "constant"
    """The base learning rate throughout."""


class Steps(Schedule):
    kind: Literal["steps"]
    """Multiply by `factor` at each milestone."""
    milestones: tuple[float, ...] = Field(strict=False, min_length=1)
    """Positions, in the unit of the phase's duration, counted from the phase's start."""
    factor: float = Field(0.1, gt=0)
    """What the learning rate is multiplied by at a milestone."""


class Cosine(Schedule):
    kind: Literal["cosine"]
    """lr * 0.5 * (1 + cos(pi * (offset + position) / horizon))."""
    offset: float = Field(0.0, ge=0)
    """Where on the curve the phase starts, in the unit of its duration."""
    horizon: float | None = Field(None, gt=0)
    """Length of the half cosine in the same unit; default: its end is the phase's end."""


class Phase(Section):
    epochs: float | None = Field(None, gt=0)
    """Duration in passes over the training set (exactly one of epochs and steps)."""
    steps: int | None = Field(None, ge=1)
    """Duration in iterations, of any kind (exactly one of epochs and steps)."""
    optimizer: SGD
    """Optimizer of the weights. A phase of another kind than the one before begins without its momentum."""
    schedule: Constant | Steps | Cosine = Field(Constant(), discriminator="kind")
    """How the learning rate of the weights moves over the phase."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each label that is spread evenly over all classes, in the loss of this phase's steps. Recorded cross-entropies are
    without it, the recorded loss is with it."""

    mixup: float = Field(0.0, ge=0)
    """Mixup (arXiv 1710.09412): pairs of neighbours in the global order are mixed, images and labels, with a share from
    Beta(mixup, mixup), one for each step; 0: not at all. Recorded cross-entropies and accuracies are those of mixed images."""
    cutmix: float = Field(0.0, ge=0)
    """CutMix (arXiv 1905.04899): likewise, a rectangle of one image is put into the other. With both, either has half of the
    steps."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights and running statistics, such as 0.999: the average is what is evaluated, and what
    the phase leaves. Of the first iterations it is nearly their mean. Not in the search, whose weights follow the gates."""

    @model_validator(mode="after")
    def _exactly_one_duration(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of 'epochs' and 'steps'")
        if self.schedule.warmup > (duration := self.steps if self.epochs is None else self.epochs) > 0:
            raise ValueError(f"the schedule's warmup ({self.schedule.warmup:g}) is longer than the phase ({duration:g})")
        return self

    def iterations(self, steps_per_epoch: int) -> int:
        """Duration in iterations; at least 1, unless the recipe says 0."""
        return self.steps if self.steps is not None else max(int(self.epochs > 0), round(self.epochs * steps_per_epoch))


class OptionalPhase(Phase):
    epochs: float | None = Field(None, ge=0)
    """Duration in passes over the training set (exactly one of epochs and steps); 0 leaves the phase out."""
    steps: int | None = Field(None, ge=0)
    """Duration in iterations (exactly one of epochs and steps); 0 leaves the phase out."""


class SearchPhase(OptionalPhase):
    weight_steps: int = Field(1, ge=0)
    """Weight steps in each cycle of the search, on alternate iterations; 0 freezes the weights, as in the authors' code."""
    architecture_steps: int = Field(1, ge=1)
    """Architecture steps in each cycle, after its weight steps."""

    @property
    def cycle(self) -> int:
        """Iterations of one cycle."""
        return self.weight_steps + self.architecture_steps

    @model_validator(mode="after")
    def _weights_follow_the_gates(self):
        if self.ema is not None:
            raise ValueError("the search has no 'ema', which would lag behind gates that harden; give it to pretrain or finetune")
        return self

    @model_validator(mode="after")
    def _every_part_of_delta_is_whole(self):
        if self.epochs is not None and self.epochs != int(self.epochs):
            raise ValueError("the search's 'epochs' must be whole, since delta grows once an epoch; 'steps' grows it every step")
        return self


class Distillation(Section):
    weight: float = Field(0.5, gt=0, le=1)
    """Share of the loss that is the divergence from the teacher; the rest is the cross-entropy with the labels."""
    temperature: float = Field(1.0, gt=0)
    """What the logits of both are divided by; the divergence is multiplied by its square (arXiv 1503.02531)."""
    teacher: OneLine | None = None
    """The network to learn from: a run folder, whose network is taken as its pretrain left it; compact:FOLDER, a run's compact
    network or an export; or torchvision:NAME or timm:NAME with published weights. null: the run's own, as its pretrain left it."""


class Phases(Section):
    pretrain: OptionalPhase
    """Weights only, no gates. With no iterations the search begins with the weights as they are, those of model.init_from say."""
    search: SearchPhase
    """Weights and architecture on alternate iterations while the gates harden. With no iterations the compact network of a finished
    run, model.init_from, is finetuned on; or that of model.name=compact:RUN."""
    finetune: Phase
    """The compact network."""
    distillation: Distillation | None = None
    """In search and finetune, learn also from what a teacher says, at the price of its forward pass."""

    @model_validator(mode="after")
    def _what_comes_before_a_finetune_alone(self):
        if not self.search.iterations(1):
            if self.pretrain.iterations(1):
                raise ValueError("without a search only a compact network is finetuned; give pretrain no iterations either")
            if self.distillation is not None and self.distillation.teacher is None:
                raise ValueError("without a search there is no teacher to distil from; give 'distillation.teacher', or remove it")
        return self


def amount(text: str | int | float) -> tuple[float, bool]:
    """A cost such as 300M, 1.2G, 40k or 123456 as (number, False); a share of the full network, 0.5x or 50%, as (0.5, True).

    Raises ValueError for anything else, and for what is not above 0.
    """
    found = (
        re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*([kKMGTx%]?)\s*", str(text)) if not isinstance(text, bool) else None
    )
    number = float(found[1] + (found[2] or "")) if found else 0.0
    number *= {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "%": 0.01}.get(found[3], 1) if found else 1
    if not 0 < number < 1e18:
        raise ValueError(f"expected an amount such as 300M, 1.2G or 40k, or a share such as 0.5x, found {text!r}")
    return number, found[3] in ("x", "%")


def duration(text: str | int | float) -> tuple[float, bool]:
    """A latency such as 3ms or 800us as (seconds, False); a share of the full network's, 0.4x or 40%, as (0.4, True).

    Raises ValueError for anything else, and for what is not above 0.
    """
    words = "" if isinstance(text, bool) else str(text)
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(us|ms|s|x|%)\s*", words)
    number = float(found[1]) * {"us": 1e-6, "ms": 1e-3, "%": 0.01}.get(found[2], 1) if found else 0.0
    if not 0 < number < 1e6:
        raise ValueError(f"expected a latency such as 3ms or 800us, or a share such as 0.4x, found {text!r}")
    return number, found[2] in ("x", "%")


def _checked_amount(text: str | int | float) -> str | int | float:
    amount(text)
    return text


def _checked_duration(text: str | int | float) -> str | int | float:
    duration(text)
    return text


Amount = Annotated[str | int | float, BeforeValidator(_checked_amount)]
Duration = Annotated[str | int | float, BeforeValidator(_checked_duration)]


class Target(Section):
    macs: Amount | None = None
    """MACs for one image, exact rule: 300M, 1.2G, 40k, a number, or a share of the full network's such as 0.5x or 50%."""
    params: Amount | None = None
    """Parameters, likewise. Of several budgets each holds; the tightest is met."""
    latency: Duration | None = None
    """Time for a batch, predicted by `table` and measured by pruning: 3ms, 800us, or a share of the full network's such as 0.4x."""
    table: Annotated[OneLine, AfterValidator(expanded)] | None = None
    """File of the layers' times on the device that counts, which `python -m dnal_dist.latency RECIPE --profile FILE` writes."""
    measured: bool = True
    """Whether pruning measures its compact network beside the full one, where it runs on the device and runtime of `table`, and
    selects channels again until the latency is within 5 % below the target. What it selects then differs as measurements do."""

    @model_validator(mode="before")
    @classmethod
    def _is_named(cls, given):
        if not isinstance(given, dict | cls):
            raise ValueError(f"say what the amount counts, such as {{macs: {given}}} or {{params: 40k}}")
        if isinstance(given, dict) and (word := next((key for key in given if str(key).lower() == "flops"), None)):
            raise ValueError(
                f"'{word}' counts a multiply-add as one operation in some tables and as two in others; give 'macs', "
                "multiply-adds once: as many as the paper's FLOPs, half of those that count two"
            )
        return given

    @model_validator(mode="after")
    def _counts_something(self):
        if not self.chosen:
            raise ValueError("give one or several of 'macs', 'params' and 'latency', such as {macs: 0.5x}")
        if self.latency is not None and self.table is None:
            raise ValueError("'latency' needs 'table', a file; write it by python -m dnal_dist.latency RECIPE --profile FILE")
        return self

    @property
    def chosen(self) -> list[tuple[str, str | int | float]]:
        """Each unit that there is a budget of, and the amount."""
        given = {"macs": self.macs, "params": self.params, "latency": self.latency}
        return [(unit, text) for unit, text in given.items() if text is not None]


class ArchitectureSettings(Section):
    criterion: Literal["alpha", "taylor"] = "alpha"
    """How channels are chosen. alpha: alphas are learned by gradient descent while their gates harden. taylor, which needs
    `target`: gates are 0 or 1, and channels close in eight rounds until the target is met, first those with the least mean square
    of the gate's gradients over batches, per unit of cost; `optimizer`, `delta_*`, `penalty` and `threshold` are unused."""
    candidates: Literal["all", "one"] = "all"
    """What a sum of several branches keeps, such as a supernet's cell of its candidates. all: any of them, each with the channels
    that are worth their cost. one, by criterion taylor: the branch whose channels have the largest squared gradients per unit of
    cost, as far as `target` can be met with it; the others leave in the first half of the rounds. Such networks have fewer and
    larger layers, and are faster for their MACs."""
    optimizer: SGD = SGD(lr=0.01)
    """SGD of alpha."""
    delta_start: float = Field(1.0, gt=0)
    """Hardness of the gates before the search."""
    delta_final: float = Field(10_000.0, gt=0)
    """Hardness in its last epoch (or step, if the search's duration is in steps); the growth between is geometric."""
    penalty: Literal["sigmoid", "scaled_sigmoid", "expected_macs", "root_macs"] = "sigmoid"
    """What is added to the loss, times the penalty weight: the sum of sigmoid(alpha) (authors' code); that of the gates
    sigmoid(delta * alpha); expected_macs, the expected MACs as a share of the full network's (parameters instead, if they
    are what `target` is about); or root_macs, the mean gate weighted by the square root of what each channel costs."""
    penalty_weight: float | None = Field(None, ge=0)
    """The lambda of the paper. With few iterations it must be larger in proportion. Exactly one of this and `target`."""
    target: Target | None = None
    """What the network may cost, in place of a penalty weight, which is then driven in closed loop during the search."""
    streams: Literal["tied", "free"] | None = None
    """What layers close that write to one residual stream. tied: the same channels, so that compact networks have plain sums and
    run fastest; the default for networks of libraries. free: each its own; the default for the networks of this project, as in the
    paper."""
    round_to: int = Field(1, ge=1, le=64)
    """Each site keeps a multiple of so many channels (all of them, or none where it may close as a whole). Runtimes are fast at
    multiples of 8 or 16, and a depthwise convolution off a multiple of 4 is slow."""
    tolerance: float = Field(0.01, gt=0, lt=1)
    """Share of the target that may be left unused; it is never exceeded."""
    threshold: float = Field(0.9, gt=0, lt=1)
    """A channel stays if its gate is above this when the search ends."""
    recalibration_batches: int = Field(50, ge=0)
    """Training batches over which the BatchNorms of the compact network take their statistics again after pruning; 0 keeps those of
    the search."""
    min_macs: float = Field(0.02, ge=0, lt=1)
    """Collapse guard, as a share of the full network's MACs: below it the penalty rests during the search, and at
    pruning the channels with the largest alpha stay open until it is reached. 0 switches it off."""

    @model_validator(mode="after")
    def _alpha_takes_sgd(self):
        if self.optimizer.kind != "sgd":
            raise ValueError(f"'optimizer.kind': alpha takes sgd, found {self.optimizer.kind!r}")
        return self

    @model_validator(mode="after")
    def _delta_grows(self):
        if self.delta_final < self.delta_start:
            raise ValueError("delta_final must be at least delta_start, since gates harden as delta grows")
        return self

    @model_validator(mode="after")
    def _weight_or_target(self):
        if (self.penalty_weight is None) == (self.target is None):
            raise ValueError("give exactly one of 'penalty_weight' (such as 1e-4) and 'target' (such as {macs: 0.5x})")
        if self.criterion == "taylor" and self.target is None:
            raise ValueError("'criterion': taylor closes channels until a target is met; give 'target', such as {macs: 0.5x}")
        if self.candidates == "one" and self.criterion != "taylor":
            raise ValueError("'candidates': one candidate a cell is chosen by criterion taylor only; give 'criterion: taylor'")
        return self
