"""Compact networks: `load` one from a run's folder, or make one from a gated network and a keep mask by `compact`."""

from dnal_dist.nets.compact import build, compact, describe, load, save

__all__ = ["build", "compact", "describe", "load", "save"]
