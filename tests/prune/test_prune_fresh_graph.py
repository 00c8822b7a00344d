"""Fresh weights for a pruned model that only its graph holds: the controls of a curve."""

from __future__ import annotations

import pytest
import torch

from paredown.allocate import allocate
from paredown.budget import Budget
from paredown.couple import couple
from paredown.errors import RejectedError
from paredown.examine import examine
from paredown.pipeline.trial import _anew
from paredown.program import GraphModel, capture
from paredown.prune import Pruned, fresh, prune
from paredown.recipes.cifar10 import CifarResNet
from paredown.score import score


@pytest.fixture(scope="module")
def thin() -> Pruned:
    """The shortcut of option A pads by a number that the class holds: with a thinner stream only the graph fits."""
    program = capture(fresh(CifarResNet(1), seed=3), torch.randn(2, 3, 16, 16))
    coupling = couple(program)
    plan = allocate(
        coupling, score(program, coupling, "random", seed=0), examine(program), Budget(macs=0.5), allocation="uniform", align=1, floor=0.0
    )  # fmt: skip
    return prune(program, plan)


def test_a_graph_gets_fresh_weights_of_its_own_size(thin: Pruned) -> None:
    assert isinstance(thin.module, GraphModel)
    with pytest.raises(RejectedError, match="reset_parameters"):
        fresh(thin.module)
    made, again, other = (_anew(thin, seed).module for seed in (0, 0, 1))
    states = [m.state_dict() for m in (made, again, other)]
    assert [t.shape for t in states[0].values()] == [t.shape for t in thin.module.state_dict().values()]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not torch.equal(states[0]["layer2.0.conv1.weight"], states[2]["layer2.0.conv1.weight"])
    for name, parameter in made.named_parameters():
        if parameter.dim() == 4:  # as nn.Conv2d draws: uniform, of variance 1 / (3 · inputs)
            wanted = (1 / (3 * parameter[0].numel())) ** 0.5
            assert float(parameter.std()) == pytest.approx(wanted, rel=0.15), name
    x = torch.randn(8, 3, 16, 16)
    assert made.train()(x).isfinite().all() and made.eval()(x).shape == (8, 10)
