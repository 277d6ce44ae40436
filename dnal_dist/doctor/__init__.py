"""Checks before a run. Each is a function of a Case that returns a Finding."""
