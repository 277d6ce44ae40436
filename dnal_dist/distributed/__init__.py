"""Processes and backends: DDP, FSDP2 and ZeRO behind one interface."""

import importlib

# Module and class of each backend, imported when it is used. A new backend is a module with a subclass of wrapper.Trained, a line
# here, and a reader of its settings in accelerate_config.
BACKENDS = {
    **dict.fromkeys(("single", "ddp"), ("ddp", "Replicated")),
    "fsdp2": ("fsdp2", "FullySharded"),
    **dict.fromkeys(("zero1", "zero2", "zero3"), ("zero", "Zero")),
}


def backend(name: str) -> type:
    """The class that wraps a network on the backend called `name`."""
    module, kind = BACKENDS[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)
