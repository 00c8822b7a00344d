"""Targets: runtimes as tables. Data only, no torch."""

from paredown.target.reasons import why_float
from paredown.target.tables import TARGETS, Target, named

__all__ = ["TARGETS", "Target", "named", "why_float"]
