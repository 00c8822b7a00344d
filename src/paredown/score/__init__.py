"""Score: how important every unit is."""

from __future__ import annotations

from paredown.score.nouns import Criterion, Scores, Source
from paredown.score.table import TABLE
from paredown.score.verb import score

__all__ = ["TABLE", "Criterion", "Scores", "Source", "score"]
