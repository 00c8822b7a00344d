"""Statistics: what reaches and leaves the weights of a program, streamed over batches."""

from __future__ import annotations

from paredown.statistics.inputs import InputStatistics, input_statistics
from paredown.statistics.outputs import OutputStatistics, output_statistics

__all__ = ["InputStatistics", "OutputStatistics", "input_statistics", "output_statistics"]
