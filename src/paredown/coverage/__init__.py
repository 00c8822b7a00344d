"""Coverage: which published models can be pruned, how far, and with what proof."""

from __future__ import annotations

from paredown.coverage.sweep import Limits, Row, sweep
from paredown.coverage.table import counts, markdown

__all__ = ["Limits", "Row", "counts", "markdown", "sweep"]
