"""Removal of units, physically, with a proof."""

from paredown.prune.depth_scores import DepthCandidate, depth_candidates, drop_lowest, score_depth
from paredown.prune.files import load, load_pruned, save
from paredown.prune.gates import Gates
from paredown.prune.given import masks_of, take_over
from paredown.prune.movement import Movement, SoftMovement, SrSte
from paredown.prune.nouns import Proof, Pruned
from paredown.prune.obs import obs
from paredown.prune.reconstruct import reconstruct
from paredown.prune.regularize import Growing, Slimming
from paredown.prune.remove import compose, condense, prune
from paredown.prune.schedule import Gradual, Iterative, Lottery, OneShot, Regrowth
from paredown.prune.scratch import fresh
from paredown.prune.sizes import Sizes, mask_sizes
from paredown.prune.sparsify import sparsify

__all__ = [
    "DepthCandidate",
    "Gates",
    "Gradual",
    "Growing",
    "Iterative",
    "Lottery",
    "Movement",
    "OneShot",
    "Proof",
    "Pruned",
    "Regrowth",
    "Sizes",
    "Slimming",
    "SoftMovement",
    "SrSte",
    "compose",
    "condense",
    "depth_candidates",
    "drop_lowest",
    "fresh",
    "load",
    "load_pruned",
    "mask_sizes",
    "masks_of",
    "obs",
    "prune",
    "reconstruct",
    "save",
    "score_depth",
    "sparsify",
    "take_over",
]
