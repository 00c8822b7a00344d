"""Removal of units, physically, with a proof."""

from paredown.prune.files import load, save
from paredown.prune.given import masks_of, take_over
from paredown.prune.nouns import Proof, Pruned
from paredown.prune.reconstruct import reconstruct
from paredown.prune.remove import compose, condense, prune

__all__ = ["Proof", "Pruned", "compose", "condense", "load", "masks_of", "prune", "reconstruct", "save", "take_over"]
