"""The records of metrics.jsonl as one typed model, docs/run-folder.md as data: whatever is wrong is dropped and counted."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from dnal_dist.common.phases import Phase
from dnal_dist.common.text import printable

Text = Annotated[str, Field(max_length=100_000), AfterValidator(lambda words: printable(words[:2000]))]
Count = Annotated[int, Field(ge=0, le=10**18)]
# Beyond these bounds nothing can be drawn, and no run is.
Number = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
Quantity = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
Scalar = bool | Count | Number | Text | None
Counts = Annotated[list[Count], Field(min_length=1, max_length=1000)]


class Amounts(TypedDict):
    macs: Count
    params: Count


class Cost(TypedDict):
    exact: Amounts
    paper: NotRequired[Amounts]


class Budget(TypedDict):
    unit: Literal["macs", "params", "latency"]
    least: Count
    most: Count
    used: NotRequired[Count]
    predicted: NotRequired[Count]


class Latency(TypedDict):
    """Of a batch, by network, in seconds."""

    batch: Count
    threads: Count
    runtime: Text
    median: dict[Text, Positive]
    faster: dict[Text, Positive]
    """How many times faster than the full network, if there is one: the median over rounds, each with its own time of both."""
    spread: NotRequired[dict[Text, Quantity]]
    """Half of what lies between the first and the third quartile."""
    slower: NotRequired[list[Text]]
    """Networks that were slower than the full one in three rounds of four."""


class Usage(TypedDict, total=False):
    seconds: Seconds
    images: Count
    device_seconds: Seconds
    bytes_sent: Quantity
    energy_kwh: Quantity


class Record(Usage, total=False):
    """The keys of all kinds, those of a phase's usage among them: each has one type, whatever the kind. Keys of later releases are
    left out."""

    kind: Annotated[str, Field(min_length=1, max_length=40)]
    time: Seconds
    global_step: Count
    phase: Phase
    step: Count
    phase_steps: Count
    epoch: Annotated[float, Field(ge=0, le=1e12)]
    # start
    name: Text
    init_from: Text
    resumed: bool
    changed: dict[Text, Annotated[list[Scalar | list[Scalar] | dict[Text, Scalar]], Field(min_length=2, max_length=2)]]
    world_size: Annotated[int, Field(ge=1, le=10**6)]
    backend: Text
    precision: Text
    accumulation: Count
    device: Text
    train_samples: Count
    val_samples: Count
    steps_per_epoch: Count
    dropped_per_epoch: Count
    sites: dict[Text, Annotated[int, Field(ge=1, le=10**7)]]
    shortcuts: list[Text]
    full: Cost
    versions: dict[Text, Scalar]
    environment: dict[Text, Scalar]
    host: Text
    code: Text
    slurm_job: Text | Count
    # train, eval, gates
    loss: Number
    cross_entropy: Number
    penalty: Number
    accuracy: Fraction
    balanced_accuracy: Fraction
    top5: Fraction
    samples: Count
    per_class: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]
    learning_rate: Number
    delta: Positive
    open_share: Fraction
    expected_macs: Quantity
    expected_params: Quantity
    images_per_second: Annotated[float, Field(ge=0, le=1e12)]
    data_wait_seconds: Seconds
    bad_samples: Count
    histogram: Counts
    by_site: dict[Text, Counts]
    open: dict[Text, Count]
    # signal
    significant: Fraction
    # prune
    kept: dict[Text, Count]
    mask: str
    threshold: Fraction
    budget: Budget
    further_budgets: list[Budget]
    compact: Cost
    layers: dict[Text, dict[Literal["full", "compact"], Amounts]]
    rescued: list[Text]
    collapsed: bool
    # receipt
    batches: Count
    digest: Text
    ordered: Text
    skipped: list[list[Scalar]]
    class_counts: list[Count]
    # latency; phase, end, warning
    rows: list[Latency]
    breakdown: dict[Text, Seconds]
    phase_seconds: dict[Phase, Seconds]
    ledger: dict[Phase, Usage]
    message: Text


_MODEL = TypeAdapter(Record)


def typed(tree: Any) -> tuple[dict | None, list[str]]:
    """A line's JSON as a record with its valid keys, and the keys that were wrong. None if it is no record. Never raises."""
    if not isinstance(tree, dict) or not isinstance(tree.get("kind"), str):
        return None, []
    try:
        return _MODEL.validate_python(tree, strict=True), []
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        wrong = list(dict.fromkeys(str(one["loc"][0]) for one in found))
    except RecursionError:
        return None, []
    record, _ = typed({key: value for key, value in tree.items() if key not in wrong})
    return record, wrong
