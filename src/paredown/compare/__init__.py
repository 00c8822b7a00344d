"""Compare: runs side by side from their records, and files side by side in every runtime at hand, timed in one schedule."""

from paredown.compare.nouns import Comparison, Difference, RunRow, Timing
from paredown.compare.verb import compare

__all__ = ["Comparison", "Difference", "RunRow", "Timing", "compare"]
