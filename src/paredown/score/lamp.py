"""lamp: squared size as a share of all that is at least as large in its layer (Lee et al. 2021, "LAMP", eq. 1).

Made for a global ranking: it finds each layer's density by itself. Where we differ: of equal weights each counts the
others, so that the order of channels does not matter; units and cells take Σ w² in the place of w².
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paredown.score.l2 import L2Options, l2
from paredown.score.nouns import Elements, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class LampOptions:
    """No options."""


def lamp(source: Source, options: LampOptions) -> Iterator[Elements]:
    """Element saliency w²; the verb divides by Σ over what is at least as large, within the layer or space."""
    del options
    yield from l2(source, L2Options())
