"""The table of criteria: one line each. The contract suite runs over it."""

from __future__ import annotations

from collections.abc import Mapping

from paredown.score.bn_scale import BnScaleOptions, bn_scale
from paredown.score.chance import RandomOptions, random
from paredown.score.l1 import L1Options, l1
from paredown.score.l2 import L2Options, l2
from paredown.score.nouns import Criterion
from paredown.score.taylor import TaylorOptions, taylor

TABLE: Mapping[str, Criterion] = {
    "l1": Criterion(elements=l1, options=L1Options),
    "l2": Criterion(elements=l2, options=L2Options),
    "bn_scale": Criterion(units=bn_scale, options=BnScaleOptions),
    "taylor": Criterion(elements=taylor, options=TaylorOptions, squared=True, needs_data=True),
    "random": Criterion(units=random, options=RandomOptions, of_weights=False),
}
