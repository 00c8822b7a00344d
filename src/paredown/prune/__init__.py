"""Removal of units, physically, with a proof."""

from paredown.prune.depth_scores import DepthCandidate, depth_candidates, drop_lowest, score_depth
from paredown.prune.files import load, save
from paredown.prune.given import masks_of, take_over
from paredown.prune.nouns import Proof, Pruned
from paredown.prune.reconstruct import reconstruct
from paredown.prune.remove import compose, condense, prune
from paredown.prune.sizes import Sizes, mask_sizes

__all__ = [
    "DepthCandidate",
    "Proof",
    "Pruned",
    "Sizes",
    "compose",
    "condense",
    "depth_candidates",
    "drop_lowest",
    "load",
    "mask_sizes",
    "masks_of",
    "prune",
    "reconstruct",
    "save",
    "score_depth",
    "take_over",
]
