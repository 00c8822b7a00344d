"""What a record says of masks: bytes and MACs that they could save, and their cells small enough for a journal."""

from __future__ import annotations

from typing import Any

import numpy as np

from paredown.examine import examine
from paredown.pipeline.ways import simulated
from paredown.plan import Mask
from paredown.program import capture
from paredown.prune import Pruned
from paredown.prune.sizes import sizes_at

CELLS = 24
"""Rows and columns of a recorded picture at most."""
PICTURES = 12
"""Weights with a picture: the largest."""


def told(tuned: Pruned) -> dict[str, Any]:
    """Of a masked model: effective MACs and bytes of sparse formats (estimated), gzip (measured), a picture per weight.

    A picture is one text per row, one digit per cell: 0 all pruned, 9 all kept, between them the share that stays.
    """
    if not tuned.plan.masks:
        return {}
    program = capture(tuned.module, tuned.program.inputs, train=False)
    found = simulated(tuned, program)
    sizes = sizes_at(tuned, examine(program))
    largest = sorted(sizes.layers, key=lambda layer: -layer.num_zeros)[:PICTURES]
    pictures = {layer.name: picture(tuned.plan.masks[layer.name]) for layer in largest}
    weights = {
        layer.name: {
            "granularity": layer.granularity,
            "zeros": layer.num_zeros,
            "of": int(np.prod(layer.shape)),
            "density": 1 - layer.sparsity,
            "dense_bytes": layer.dense_bytes,
            "best_bytes": layer.best_bytes,
            "picture": pictures.get(layer.name, []),
        }
        for layer in sizes.layers
    }
    return {
        **found,
        "dense_bytes": sizes.dense_bytes,
        "bitmask_bytes": sizes.bitmask_bytes,
        "best_bytes": sizes.best_bytes,
        "gzip_bytes": sizes.file_gzip_bytes,
        "weights": weights,
    }


def picture(mask: Mask, most: int = CELLS) -> list[str]:
    """Rows of digits, the matrix [out, in × kernel] in at most `most` × `most` cells; for N:M the inputs stand last.

    >>> picture(Mask.of(np.array([[True, False], [True, True]]), "element"))
    ['90', '99']
    """
    from paredown.report.pictures import shades

    shares, _ = shades(mask.kept, mask.granularity, most)
    # What is not all kept or all pruned shows as such, however near it is.
    digits = np.where((shares > 0) & (shares < 1), np.clip(np.rint(shares * 9), 1, 8), shares * 9).astype(int)
    return ["".join(map(str, row)) for row in digits.tolist()]
