"""Removal of units, physically, with a proof."""

from paredown.prune.nouns import Proof, Pruned
from paredown.prune.remove import prune

__all__ = ["Proof", "Pruned", "prune"]
