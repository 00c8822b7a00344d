"""Targets: runtimes as tables. Data only, no torch."""

from paredown.target.tables import TARGETS, Target, named

__all__ = ["TARGETS", "Target", "named"]
