"""Contract suite over the table of criteria, and brute force on nets small enough to count by hand."""

from __future__ import annotations

import functools
import hashlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paredown.couple import couple
from paredown.couple.space import Coupling, Footprint, Space
from paredown.errors import RejectedError, UsageError
from paredown.program import Program, capture
from paredown.score import TABLE, Scores, score


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 4)
    )
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    return model.eval()


def coupling() -> Coupling:
    """By hand: 6 channels of the first convolution, 5 of the second, each of them 16 columns of the linear layer."""

    def footprint(parameter: str, axis: int, units: int, per: int, role: str) -> Footprint:
        return Footprint(parameter=parameter, axis=axis, indices=np.arange(units * per).reshape(units, per), role=role)  # type: ignore[arg-type]

    first = [
        footprint("0.weight", 0, 6, 1, "write"),
        footprint("0.bias", 0, 6, 1, "write"),
        footprint("3.weight", 1, 6, 1, "read"),
    ]
    first += [footprint(f"1.{n}", 0, 6, 1, "write") for n in ("weight", "bias", "running_mean", "running_var")]
    second = [
        footprint("3.weight", 0, 5, 1, "write"),
        footprint("3.bias", 0, 5, 1, "write"),
        footprint("5.weight", 1, 5, 16, "read"),
    ]
    spaces = (Space(name="first", footprints=tuple(first)), Space(name="second", footprints=tuple(second)))
    return Coupling(spaces=spaces, pinned=(), unknown_ops={})


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3])) for _ in range(3)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def program(model: nn.Module) -> Program:
    return capture(model, torch.zeros(2, 3, 8, 8), train=False)


@functools.cache
def usual() -> Program:
    """The network as it is; no test changes it."""
    return program(net())


def scored(criterion: str, given: Program | None = None, **options: Any) -> Scores:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bn_scale says that the second space has no batch norm
        return score(given or usual(), coupling(), criterion, batches=batches(), loss=loss, **options)


def state_hash(model: nn.Module) -> str:
    digest = hashlib.sha256(str(model.training).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("criterion", TABLE)
@pytest.mark.parametrize("group", ["write", "all"])
def test_contract_of_every_criterion(criterion: str, group: Any) -> None:
    given = usual()
    before = state_hash(given.module)
    first, again = (scored(criterion, given, group=group) for _ in range(2))
    assert set(first.by_space) == {"first", "second"}
    for name, length in (("first", 6), ("second", 5)):
        values = first.by_space[name]
        assert values.shape == (length,)
        assert values.dtype == np.float64
        assert np.isfinite(values).all()
        assert len(np.unique(values)) >= (2 if criterion == "apoz" else length) or (criterion, name) == (
            "apoz",
            "second",
        )
        np.testing.assert_array_equal(values, again.by_space[name])
    assert state_hash(given.module) == before
    assert all(p.grad is None for p in given.module.parameters())


@pytest.mark.parametrize("criterion", [n for n, row in TABLE.items() if row.of_weights])
def test_permuting_channels_permutes_scores(criterion: str) -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    model, permuted = net(), net()
    with torch.no_grad():
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            permuted.state_dict()[name].copy_(model.state_dict()[name][order])
        permuted[3].weight.copy_(model[3].weight[:, order])
    a, b = scored(criterion, program(model)), scored(criterion, program(permuted))
    # Sums in another order differ in the last bit, which solving with H (damping 1e-3) makes a thousand times as large.
    rtol = 1e-3 if criterion == "refit" else 1e-4
    np.testing.assert_allclose(b.by_space["first"], a.by_space["first"][order.numpy()], rtol=rtol)
    np.testing.assert_allclose(b.by_space["second"], a.by_space["second"], rtol=rtol)


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_norms_by_hand(criterion: str, power: int) -> None:
    weight = net()[3].weight.detach().numpy().astype(np.float64)
    expected = [sum(abs(v) ** power for v in weight[u].ravel()) for u in range(5)]
    np.testing.assert_allclose(scored(criterion).by_space["second"], expected, rtol=1e-5)
    model = net()
    everything = [
        expected[u]
        + abs(model[3].bias[u].item()) ** power
        + sum(abs(v) ** power for v in model[5].weight[:, 16 * u : 16 * u + 16].ravel().tolist())
        for u in range(5)
    ]
    np.testing.assert_allclose(scored(criterion, group="all").by_space["second"], everything, rtol=1e-5)


def test_bn_scale_by_hand_and_its_fallback_is_loud() -> None:
    with pytest.warns(UserWarning, match="falls back to l1.*second"):
        found = score(usual(), coupling(), "bn_scale")
    np.testing.assert_allclose(found.by_space["first"], net()[1].weight.detach().abs().numpy())
    np.testing.assert_allclose(found.by_space["second"], scored("l1").by_space["second"])
    assert "second" in found.notes[0]


def test_bn_scale_of_rows_is_that_of_the_norm_behind_each_filter() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    net[1].weight.data = torch.tensor([0.5, -3.0, 0.0, 1.0, 2.0, -0.1])  # type: ignore[union-attr]
    program = capture(net.eval(), torch.zeros(2, 3, 5, 5))
    with pytest.warns(UserWarning, match=r"falls back to l1 where no batch norm is: 3.weight, 5.weight"):
        found = score(program, couple(program), "bn_scale", granularity="filter").by_cell
    assert found["0.weight"].tolist() == pytest.approx([0.5, 3.0, 0.0, 1.0, 2.0, 0.1])
    assert found["3.weight"] == pytest.approx(net[3].weight.detach().abs().mean((1, 2, 3)).numpy())  # type: ignore[operator, union-attr]


def test_taylor_is_the_slope_of_the_loss_in_a_gate() -> None:
    """Σ g·w over a filter is d loss / d gate, the gate scaling the filter: checked by finite differences in float64."""
    found = scored("taylor").by_space["second"]
    expected = np.zeros(5)
    for batch in batches():
        for unit in range(5):
            slopes = []
            for step in (1e-4, -1e-4):
                model = net().double()
                with torch.no_grad():
                    model[3].weight[unit] *= 1 + step
                    slopes.append(loss(model, (batch[0].double(), batch[1])).item())
            expected[unit] += ((slopes[0] - slopes[1]) / 2e-4) ** 2 / 3
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_taylor_reads_num_batches_and_the_module_it_is_given() -> None:
    taken = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield batches()[0]

    score(usual(), coupling(), "taylor", batches=endless(), loss=loss, num_batches=2)
    assert len(taken) == 2
    other = score(usual(), coupling(), "taylor", batches=batches(), loss=loss, module=net(1))
    assert not np.allclose(other.by_space["first"], scored("taylor").by_space["first"])


def test_frozen_parameters_are_scored_and_stay_frozen() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    given = program(model)
    assert scored("taylor", given).by_space["first"].max() > 0
    assert not dict(given.module.named_parameters())["0.weight"].requires_grad


def test_random_depends_on_the_seed_only() -> None:
    a, b, c = (scored("random", program(net(n)), seed=s) for n, s in ((0, 1), (5, 1), (0, 2)))
    np.testing.assert_array_equal(a.by_space["first"], b.by_space["first"])
    assert not np.array_equal(a.by_space["first"], c.by_space["first"])


def test_normalized_scores_have_mean_one() -> None:
    for values in scored("l1").normalized().values():
        assert values.mean() == pytest.approx(1)
    assert scored("l1").normalized("max")["first"].max() == pytest.approx(1)
    silent = Scores(criterion="l1", by_space={"dead": np.zeros(4)})
    assert silent.normalized()["dead"].tolist() == [0, 0, 0, 0]  # an all-zero layer goes first, without NaN


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"criterion": "tailor"}, UsageError, "Did you mean 'taylor'"),
        ({"criterion": "taylor"}, UsageError, "batches and a loss"),
        ({"criterion": "taylor", "batches": [], "loss": loss}, RejectedError, "at least one batch"),
        ({"criterion": "taylor", "batches": [1], "loss": loss, "weights_given": False}, RejectedError, "random"),
        ({"criterion": "taylor", "batches": [1], "loss": lambda m, b: torch.ones(3)}, RejectedError, "scalar"),
        (
            {"criterion": "taylor", "batches": [1], "loss": lambda m, b: 0 * m[0].weight.sum() + np.nan},
            RejectedError,
            "finite",
        ),
        ({"criterion": "l1", "power": 3}, UsageError, "power"),
        ({"criterion": "l1", "group": "some"}, UsageError, "group"),
    ],
)
def test_wrong_use_is_refused(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        score(usual(), coupling(), **options)


def test_nan_scores_name_the_layer() -> None:
    given = program(net())
    given.state["3.weight"].data[2] = float("nan")
    with pytest.raises(RejectedError, match="second"):
        score(given, coupling(), "l1")
