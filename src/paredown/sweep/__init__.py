"""Sweep: many trials of one recipe. `grid` says which; `local` and `ray` run those that are missing and read what came out.

An engine is two functions, `run_missing` and `read_results`; what a trial does is not known here.
"""

from paredown.sweep.grid import Cell, grid

__all__ = ["Cell", "grid"]
