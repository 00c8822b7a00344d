"""wanda layer after layer: each weight by the inputs that the masked layers before leave it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paredown as pare
from paredown.budget import Budget
from paredown.errors import UsageError
from paredown.score import Scores
from paredown.score.wanda import WandaOptions


class Product(nn.Module):
    """A weight stored [in, out], and a layer that is used twice: its second use sees the first as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.again(torch.relu(self.first(x)) @ self.weight).tanh()))


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    image = torch.randn(6, 8, 9, 9)
    return {
        "linear": (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(6, 8)),
        "convolutions": (nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(), nn.Conv2d(12, 4, 1)), image),
        "transposed": (nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)), image),
        "attention": (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(6, 5, 8)),
        "product": (Product(), torch.randn(6, 8)),
    }  # fmt: skip


NETS = nets()


def scored(name: str, granularity: str = "element", net: nn.Module | None = None, **options: Any) -> Scores:
    net_, x = NETS[name]
    program = pare.capture((net or net_).eval(), x[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = [x[:2], x[2:]]
        return pare.score(program, pare.couple(program), "wanda", granularity=granularity, batches=batches, **options)


@pytest.mark.parametrize("granularity", ["element", "2:4"])
@pytest.mark.parametrize("name", NETS)
def test_every_layer_is_scored_by_what_the_pruned_network_feeds_it(name: str, granularity: str) -> None:
    """The oracle is one pass over the network that these scores prune: its inputs times the dense weights."""
    net, x = NETS[name]
    plain = granularity == "element"
    found = scored(name, granularity, sequential=True, **({"density": 0.5} if plain else {}))
    program = pare.capture(net.eval(), x[:2])
    plan = pare.allocate(pare.couple(program), found, pare.examine(program), Budget(density=0.5) if plain else None)
    assert set(plan.masks) == set(found.by_cell) and all(
        m.density == pytest.approx(0.5, abs=0.1) for m in plan.masks.values()
    )
    pruned = pare.prune(program, plan, realiser="graph" if name == "attention" else "auto").module
    after, dense = scored(name, granularity, net=pruned), scored(name, granularity)
    for at, (weight, mask) in enumerate(plan.masks.items()):
        kept, size = mask.kept, np.abs(program.state[weight].detach().numpy())
        if weight == "again.weight":
            continue
        left = found.by_cell[weight][kept]
        np.testing.assert_allclose(
            left, after.by_cell[weight][kept], rtol=2e-5
        )  # of what stays weight and input are seen
        norms = found.by_cell[weight] / size
        if at == 0:
            np.testing.assert_allclose(found.by_cell[weight], dense.by_cell[weight], rtol=2e-5)
        elif at == len(plan.masks) - 1:
            assert not np.allclose(norms, dense.by_cell[weight] / size, rtol=1e-2)
    assert found.options["sequential"] is True and not {"sequential", "density"} & set(dense.options)


def test_two_layers_by_hand() -> None:
    torch.manual_seed(3)
    net, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(7, 5)
    program = pare.capture(net, x[:2])
    found = pare.score(program, pare.couple(program), "wanda", granularity="element", batches=[x], sequential=True, density=0.6).by_cell  # fmt: skip
    first = net[0].weight.detach().abs() * x.square().mean(0).sqrt()
    torch.testing.assert_close(torch.from_numpy(found["0.weight"]), first)
    kept = net[0].weight.detach().clone()
    for row, scores in zip(kept, first, strict=True):
        row[scores.argsort()[:2]] = 0.0  # 40 % of five
    hidden = torch.relu(x @ kept.T + net[0].bias.detach())
    torch.testing.assert_close(
        torch.from_numpy(found["2.weight"]), net[2].weight.detach().abs() * hidden.square().mean(0).sqrt()
    )


def test_what_is_scored_without_inputs_is_masked_before_and_what_is_computed_is_named() -> None:
    class Odd(nn.Module):
        """A weight used both ways round, and one of which the layer reads a copy."""

        def __init__(self) -> None:
            super().__init__()
            self.both, self.copied, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.both(x) @ self.both.weight
            x = nn.functional.linear(x, self.copied.weight.t().contiguous().t(), self.copied.bias)
            return self.last(x.relu())

    torch.manual_seed(1)
    net, x = Odd(), torch.randn(6, 8)
    program = pare.capture(net, x[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pare.score(program, pare.couple(program), "wanda", granularity="element", batches=[x], sequential=True, density=0.5)  # fmt: skip
    assert any("cannot see them: both.weight" in n for n in found.notes)
    assert any("computed before it is used: copied.weight" in n for n in found.notes)
    kept = net.both.weight.detach().clone()
    for row in kept:
        row[row.abs().argsort()[:4]] = 0.0
    seen = x @ kept.T @ kept
    torch.testing.assert_close(
        torch.from_numpy(found.by_cell["copied.weight"]),
        net.copied.weight.detach().abs() * seen.square().mean(0).sqrt(),
    )


@pytest.mark.parametrize(
    ("granularity", "options", "says"),
    [
        ("element", {"sequential": True}, "sequential must be given the density of the masks to come. Got None"),
        ("2:4", {"sequential": True, "density": 0.5}, "no density, since 2:4 brings its own"),
        ("row", {"sequential": True, "density": 0.5}, "sequential must be used with granularity element or N:M. Got row"),
        ("channel", {"sequential": True, "density": 0.5}, "element or N:M. Got channel"),
        ("element", {"density": 0.5}, "density must come with sequential=True"),
        ("element", {"sequential": True, "density": 1.5}, r"density must be a share in \(0, 1\)"),
        ("element", {"sequential": 1}, "sequential must be True or False"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(granularity: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        scored("linear", granularity, **options)
    assert WandaOptions() == WandaOptions(sequential=False, density=None)
