"""Checks before a run. Each is a function of a Case that returns a Finding."""

from dnal_dist.doctor.case import Case, Finding, bounded

__all__ = ["Case", "Finding", "bounded"]
