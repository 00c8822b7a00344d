"""Removal of units, physically, with a proof."""

from paredown.prune.files import load, save
from paredown.prune.nouns import Proof, Pruned
from paredown.prune.remove import compose, prune

__all__ = ["Proof", "Pruned", "compose", "load", "prune", "save"]
