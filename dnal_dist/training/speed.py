"""How much faster the compact network is than the full one, measured at the run's end."""

from dnal_dist.common.errors import reason
from dnal_dist.training.run import Run

# The measurement takes no more than this share of the run's own time, and is left out below so many seconds: a short run, such as a
# test's, is not worth one.
SHARE, LEAST_SECONDS = 0.05, 1.0
# Images at a time; a GPU is hardly used by one.
BATCHES = {"cpu": [1], "cuda": [1, 32]}


def record_latency(run: Run) -> None:
    """Record both networks' latency in PyTorch, on the device that trained, by one thread of a CPU. A run can do without."""
    seconds = min(run.recipe.tracking.latency_seconds, SHARE * sum(run.state.seconds.values()))
    if not run.context.main or seconds < LEAST_SECONDS:
        return
    try:
        # As late as this, since it brings what most runs have no use for.
        from dnal_dist.export import compared, latency

        device, size = run.context.device, run.recipe.data.image_size
        made = {"full": compared.full(run.supernet, size), "compact": compared.small(run.folder / "compact", size)}
        settings = [(batch, 1, "eager") for batch in BATCHES[device.type]]
        rows = list(latency.measure(made, size, device, settings, seconds / len(settings)))
    except Exception as error:  # of many kinds, for a number beside the run's own
        run.log.warn(f"latency was not measured ({reason(error)}); later: python -m dnal_dist.latency {run.folder}")
        return
    where = ("1 thread of " if device.type == "cpu" else "") + latency.device_name(device)
    run.log.record("latency", device=where, rows=rows)
    for warning in filter(None, map(latency.warning, rows)):
        run.log.warn(warning)
