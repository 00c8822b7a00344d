"""Allocate: scores, cost and a budget become a plan."""

from __future__ import annotations

from paredown.allocate.verb import allocate, predict

__all__ = ["allocate", "predict"]
