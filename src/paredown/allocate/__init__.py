"""Allocate: scores, cost and a budget become a plan."""

from __future__ import annotations

from paredown.allocate.foresee import Foreseen, foresee
from paredown.allocate.sensitivity import Latency, Sensitivity
from paredown.allocate.verb import allocate, predict

__all__ = ["Foreseen", "Latency", "Sensitivity", "allocate", "foresee", "predict"]
