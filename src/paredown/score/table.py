"""The table of criteria: one line each. The contract suite runs over it."""

from __future__ import annotations

from collections.abc import Mapping

from paredown.score import chance, geometric_median, hessian_trace, obs, taylor
from paredown.score.activation import ActivationOptions, apoz, mean_activation
from paredown.score.bn_scale import BnScaleOptions, bn_scale, bn_scale_rows
from paredown.score.fisher import FisherOptions, fisher
from paredown.score.grasp import GraspOptions, grasp
from paredown.score.l1 import L1Options, l1
from paredown.score.l2 import L2Options, l2
from paredown.score.lamp import LampOptions, lamp
from paredown.score.linf import LinfOptions, linf
from paredown.score.nouns import Criterion
from paredown.score.reduce import share_of_larger
from paredown.score.refit import RefitOptions, refit
from paredown.score.snip import SnipOptions, snip
from paredown.score.synflow import SynflowOptions, synflow
from paredown.score.taylor2 import Taylor2Options, taylor2
from paredown.score.wanda import WandaOptions, wanda

# fmt: off
TABLE: Mapping[str, Criterion] = {
    "l1": Criterion(elements=l1, options=L1Options),
    "l2": Criterion(elements=l2, options=L2Options),
    "linf": Criterion(elements=linf, options=LinfOptions, inner="max"),
    "lamp": Criterion(elements=lamp, options=LampOptions, within=share_of_larger),
    "bn_scale": Criterion(units=bn_scale, cells=bn_scale_rows, cell_kinds=("row",), options=BnScaleOptions),
    "geometric_median": Criterion(units=geometric_median.geometric_median, cells=geometric_median.geometric_median_cells, cell_kinds=geometric_median.KINDS, options=geometric_median.GeometricMedianOptions),
    "taylor": Criterion(elements=taylor.taylor, options=taylor.TaylorOptions, finish=taylor.finish, needs_data=True),
    "taylor2": Criterion(elements=taylor2, options=Taylor2Options, needs_data=True),
    "fisher": Criterion(elements=fisher, options=FisherOptions, needs_data=True),
    "hessian_trace": Criterion(elements=hessian_trace.hessian_trace, options=hessian_trace.HessianTraceOptions, finish=hessian_trace.finish, needs_data=True, of_weights=False),
    "apoz": Criterion(outputs=apoz, options=ActivationOptions, needs_data=True),
    "mean_activation": Criterion(outputs=mean_activation, options=ActivationOptions, needs_data=True),
    "wanda": Criterion(elements=wanda, options=WandaOptions, root=True, scope="row", needs_data=True),
    "obs": Criterion(elements=obs.obs, cells=obs.obs_cells, cell_kinds=obs.KINDS, options=obs.ObsOptions, needs_data=True),
    "refit": Criterion(units=refit, options=RefitOptions, needs_data=True),
    "snip": Criterion(elements=snip, options=SnipOptions, needs_data=True, at_init=True),
    "grasp": Criterion(elements=grasp, options=GraspOptions, needs_data=True, at_init=True),
    "synflow": Criterion(elements=synflow, options=SynflowOptions, at_init=True),
    "random": Criterion(units=chance.random, cells=chance.random_cells, cell_kinds=chance.KINDS, options=chance.RandomOptions, of_weights=False),
}
# fmt: on
