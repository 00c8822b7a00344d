"""reconstruct: least squares by other means (numpy on the activations themselves), exact cases, and what must stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hazards import HAZARDS, fresh
from oracle import captured, digest, plan_of, removed_units
from paredown.couple import couple
from paredown.errors import NothingToDo, RejectedError, UsageError
from paredown.plan import Mask, Plan
from paredown.program import Program, capture
from paredown.prune import Pruned, prune, reconstruct
from paredown.prune.least_squares import Normal


class Chain(nn.Module):
    """A layer, perhaps a batch norm and an activation, and the layer that reads it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = make()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model.eval()


def cut(model: nn.Module, x: Tensor, weight: str = "layers.0.weight", keep: tuple[int, ...] = (0, 1, 2, 3)) -> Pruned:
    """The model with the outputs `keep` of one weight, and what must leave with the others."""
    program = capture(model, x)
    coupling = couple(program)
    number, space = next((i, s) for i, s in enumerate(coupling.spaces) if s.name.startswith(weight))
    return prune(program, plan_of(program, coupling, {number: [u for u in range(len(space)) if u not in keep]}))


def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x) - other.eval()(x)).square().mean())


LINEAR_COMBINATIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Chain(nn.Linear(5, 6), nn.Linear(6, 3)), (5,)),
    "linear on tokens": (lambda: Chain(nn.Linear(5, 6), nn.Linear(6, 3, bias=False)), (7, 5)),
    "conv1d, stride": (lambda: Chain(nn.Conv1d(5, 6, 3), nn.Conv1d(6, 3, 4, stride=3, padding=2)), (5, 17)),
    "conv2d, uneven": (
        lambda: Chain(nn.Conv2d(5, 6, 1), nn.Conv2d(6, 3, (3, 2), (2, 1), (1, 0), (1, 2))),
        (5, 9, 8),
    ),
    "conv2d, padding same": (
        lambda: Chain(nn.Conv2d(5, 6, 3), nn.Conv2d(6, 3, (4, 3), padding="same", dilation=2)),
        (5, 9, 8),
    ),
    "conv2d, no bias": (lambda: Chain(nn.Conv2d(5, 6, 3), nn.Conv2d(6, 3, 3, bias=False)), (5, 8, 8)),
    "conv3d": (lambda: Chain(nn.Conv3d(5, 6, 2), nn.Conv3d(6, 3, 2, padding=1)), (5, 4, 5, 4)),
    "conv2d, then norm": (
        lambda: Chain(nn.Conv2d(5, 6, 3), nn.Conv2d(6, 3, 3, bias=False), nn.BatchNorm2d(3)),
        (5, 8, 8),
    ),
    "norm between": (lambda: Chain(nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3)), (5, 8, 8)),
}


@pytest.mark.parametrize("name", LINEAR_COMBINATIONS)
@pytest.mark.parametrize("layers", ["readers", "all"])
def test_what_leaves_is_a_combination_of_what_stays(name: str, layers: Any) -> None:
    """Channels 4 and 5 are combinations of 0…3 (with the bias): nothing is lost, also on images never seen."""
    make, shape = LINEAR_COMBINATIONS[name]
    model = seeded(make).double()
    mix = torch.randn(2, 4, dtype=torch.float64)
    first: Any = model.get_submodule("layers.0")
    with torch.no_grad():
        first.weight[4:] = (mix @ first.weight[:4].flatten(1)).reshape(first.weight[4:].shape)
        if "no bias" in name or "tokens" in name or "padding" in name or not unpadded(model):
            first.bias.zero_()  # no b' to take up a constant, or edges where it is missing
        else:
            first.bias[4:] = torch.randn(2)
    x, unseen = torch.randn(2, 40, *shape, dtype=torch.float64)
    small = cut(model, x)
    assert error(model, small.module, unseen) > 1e-3
    fitted = reconstruct(small, lambda: x.split(13), layers=layers, ridge=0.0)
    assert error(model, fitted.module, unseen) < 1e-18
    assert all(f.after < 1e-12 < f.before for f in fitted.fits.values())
    assert len(fitted.fits) == 1


def unpadded(model: nn.Module) -> bool:
    last: Any = model.get_submodule("layers.1")
    return getattr(last, "padding", 0) in (0, (0, 0), (0, 0, 0))


def test_a_norm_between_is_no_obstacle_for_doubled_channels() -> None:
    """Behind ReLU a combination is lost, a double is not."""
    model = seeded(lambda: Chain(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2))).double()
    first: Any = model.get_submodule("layers.0")
    with torch.no_grad():
        first.weight[4:], first.bias[4:] = 2 * first.weight[1:3], 2 * first.bias[1:3]
    x, unseen = torch.randn(2, 30, 3, 9, 9, dtype=torch.float64)
    fitted = reconstruct(cut(model, x), lambda: [x], ridge=0.0)
    assert error(model, fitted.module, unseen) < 1e-18


@pytest.mark.parametrize("ridge", [0.0, 0.1, 10.0])
def test_against_numpy_on_the_patches(ridge: float) -> None:
    """The same problem, written down with torch's own unfold and solved by numpy with the ridge as more rows."""
    model = seeded(lambda: Chain(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2, padding=1))).double()
    x = torch.randn(12, 3, 9, 9, dtype=torch.float64)
    small = cut(model, x)
    fitted = reconstruct(small, lambda: x.split(5), ridge=ridge)
    with torch.no_grad():
        inner = F.relu(small.module.get_submodule("layers.0")(x))
        patches = F.unfold(inner, 3, padding=1, stride=2).movedim(1, -1).reshape(-1, 36).numpy()
        wanted = model(x).movedim(1, -1).reshape(-1, 5).numpy()
    last: Any = small.module.get_submodule("layers.2")
    old = last.weight.detach().reshape(5, -1).numpy()
    centred = patches - patches.mean(0)
    amount = np.sqrt(ridge * (centred**2).sum() / 36)
    rows = np.concatenate([centred, amount * np.eye(36)])
    right = np.concatenate([wanted - wanted.mean(0), amount * old.T])
    expected = np.linalg.lstsq(rows, right, rcond=None)[0].T
    new: Any = fitted.module.get_submodule("layers.2")
    np.testing.assert_allclose(new.weight.detach().reshape(5, -1).numpy(), expected, atol=1e-8)
    np.testing.assert_allclose(new.bias.detach().numpy(), (wanted - patches @ expected.T).mean(0), atol=1e-8)
    fit = fitted.fits["layers.2.weight"]
    with torch.no_grad():
        for module, said in ((small.module, fit.before), (fitted.module, fit.after)):
            got = module(x).movedim(1, -1).reshape(-1, 5).numpy()
            np.testing.assert_allclose(said, ((got - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum())
    assert fit.after < fit.before


def test_groups_in_lockstep() -> None:
    """A grouped convolution loses the same inputs of every group; each group is fitted by itself."""
    model = seeded(lambda: Chain(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 3, groups=2))).double()
    first: Any = model.get_submodule("layers.0")
    with torch.no_grad():
        for start in (0, 6):
            first.weight[start + 4 : start + 6] = 3 * first.weight[start : start + 2]
            first.bias[start + 4 : start + 6] = 3 * first.bias[start : start + 2]
    x, unseen = torch.randn(2, 30, 3, 8, 8, dtype=torch.float64)
    small = cut(model, x)
    grouped: Any = small.module.get_submodule("layers.2")
    assert grouped.groups == 2
    assert grouped.weight.shape == (6, 4, 3, 3)
    fitted = reconstruct(small, lambda: [x], ridge=0.0)
    assert error(model, small.module, unseen) > 1e-3
    assert error(model, fitted.module, unseen) < 1e-18


def test_few_samples_and_many_inputs_are_fitted_through() -> None:
    """Fewer positions than inputs: the smallest change that fits them; memory is not inputs²."""
    model = seeded(lambda: Chain(nn.Linear(7, 600), nn.ReLU(), nn.Linear(600, 4))).double()
    x = torch.randn(20, 7, dtype=torch.float64)
    small = cut(model, x, keep=tuple(range(500)))
    fitted = reconstruct(small, lambda: x.split(6), ridge=0.0)
    assert error(model, small.module, x) > 1e-4
    assert error(model, fitted.module, x) < 1e-16
    inner = F.relu(small.module.get_submodule("layers.0")(x)).detach().numpy()
    change = (fitted.module.state_dict()["layers.2.weight"] - small.module.state_dict()["layers.2.weight"]).numpy()
    centred = inner - inner.mean(0)
    inside = change @ np.linalg.pinv(centred) @ centred  # the projection onto what the samples span
    np.testing.assert_allclose(change, inside, atol=1e-9)


@pytest.mark.parametrize("intercept", [False, True])
def test_rows_and_sums_give_the_same(intercept: bool) -> None:
    """The two forms of the solver, on either side of the switch, with a support."""
    torch.manual_seed(0)
    x, t = torch.randn(10, 12), torch.randn(10, 3)
    weight, bias = torch.randn(3, 12).double(), torch.randn(3).double()
    support = torch.rand(3, 12) < 0.6
    weight *= support
    few, many = Normal(12), Normal(12)
    few.add(x, t)
    for _ in range(2):
        many.add(x, t)  # every position twice: the same minimum
    one = few.solve(weight, bias, intercept=intercept, ridge=0.01, support=support)
    two = many.solve(weight, bias, intercept=intercept, ridge=0.01, support=support)
    assert few.count == 10
    assert many.count == 20
    torch.testing.assert_close(one.weight, two.weight)
    torch.testing.assert_close(one.bias, two.bias)
    assert not one.weight[~support].any()
    assert 2 * one.after == pytest.approx(two.after)
    assert 2 * one.before == pytest.approx(two.before)
    assert 2 * one.spread == pytest.approx(two.spread)


class Branches(nn.Module):
    """left(x) + right(x): what the first branch loses, the second can give."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
        self.right = nn.Linear(6, 5, bias=not norm)
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        return left + self.norm(self.right(x))


@pytest.mark.parametrize("norm", [False, True])
def test_a_branch_makes_up_for_its_shortcut(norm: bool) -> None:
    model = seeded(lambda: Branches(norm)).double()
    x, unseen = torch.randn(2, 60, 6, dtype=torch.float64)
    small = cut(model, x, weight="left.0.weight", keep=(0, 1))
    readers = reconstruct(small, lambda: [x], layers="readers", ridge=0.0)
    every = reconstruct(small, lambda: [x], layers="all", ridge=0.0)
    assert error(model, readers.module, unseen) < error(model, small.module, unseen)
    assert error(model, readers.module, unseen) > 1e-3  # two channels cannot say what eight said
    assert error(model, every.module, unseen) < 1e-16
    assert set(every.fits) == {"left.1.weight", "right.weight"}


def test_what_batch_norm_gave_is_what_counts() -> None:
    """A batch norm with other statistics than the dense one's is undone by the layer before it."""
    model = seeded(lambda: Chain(nn.Linear(4, 6), nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3))).double()
    x = torch.randn(50, 4, dtype=torch.float64)
    small = cut(model, x, keep=(0, 1, 2, 3, 4))  # five channels of four inputs: nothing need be lost
    norm: Any = small.module.get_submodule("layers.2")
    norm.running_var.mul_(3)
    norm.running_mean.add_(1)
    fitted = reconstruct(small, lambda: [x], ridge=0.0)
    assert error(model, small.module, x) > 1e-2
    assert error(model, fitted.module, x) < 1e-16


@pytest.mark.parametrize(
    "name", ["residual", "option_a", "channel_shuffle", "squeeze_excite", "convnext_block", "fused_qkv"]
)
@pytest.mark.parametrize("realiser", ["auto", "graph"])
def test_networks_come_nearer_to_the_dense_one(name: str, realiser: Any) -> None:
    program, coupling = captured(name)
    plan = plan_of(program, coupling, removed_units(coupling, 0))
    small = prune(program, plan, realiser=realiser)
    before = digest(small.module)
    torch.manual_seed(1)
    args, kwargs = HAZARDS[name].inputs(64)
    call = {"args": args, "kwargs": kwargs}
    fitted = reconstruct(small, lambda: [call])
    assert digest(small.module) == before
    assert fitted.fits
    assert all(f.after <= f.before + 1e-9 for f in fitted.fits.values())
    with torch.no_grad():
        dense, cut_, new = (m.eval()(*args, **kwargs) for m in (fresh(name), small.module, fitted.module))
    assert float((new - dense).square().mean()) < 0.9 * float((cut_ - dense).square().mean())
    again = reconstruct(small, lambda: [call])
    assert all(
        torch.equal(a, b)
        for a, b in zip(fitted.module.state_dict().values(), again.module.state_dict().values(), strict=True)
    )


def test_masks_frozen_and_shared_weights_stay() -> None:
    model = seeded(
        lambda: Chain(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 4))
    )
    model.get_submodule("layers.4").requires_grad_(False)
    x = torch.randn(80, 5)
    small = cut(model, x)
    kept = torch.rand(5, 4) < 0.5
    last: Any = small.module.get_submodule("layers.2")
    with torch.no_grad():
        last.weight.mul_(kept)
    masked = dataclasses.replace(
        small, plan=dataclasses.replace(small.plan, masks={"layers.2.weight": Mask.of(kept.numpy(), "element")})
    )
    fitted = reconstruct(masked, lambda: [x])
    new = fitted.module.state_dict()
    assert set(fitted.fits) == {"layers.2.weight", "layers.5.weight"}
    assert not new["layers.2.weight"][~kept].any()
    assert new["layers.2.weight"][kept].ne(last.weight[kept]).any()
    assert torch.equal(new["layers.4.weight"], model.state_dict()["layers.4.weight"])
    assert error(model, fitted.module, x) < error(model, small.module, x)


class Twice(nn.Module):
    """A layer that is used twice, and one that is used once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.relu(self.b(F.relu(self.a(x))))))  # type: ignore[no-any-return]


def test_a_layer_that_is_used_twice_stays() -> None:
    model = seeded(Twice)
    x = torch.randn(40, 5)
    program = capture(model, x)
    coupling = couple(program)
    small = prune(program, plan_of(program, coupling, removed_units(coupling, 0)))
    fitted = reconstruct(small, lambda: [x])
    assert set(fitted.fits) == {"c.weight"}
    assert torch.equal(fitted.module.state_dict()["b.weight"], small.module.state_dict()["b.weight"])


def test_the_users_step_says_what_the_inputs_are() -> None:
    model = seeded(lambda: Chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    batches = [{"x": torch.randn(20, 4), "y": torch.randn(20, 3)} for _ in range(3)]
    seen = []

    def step(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append(len(batch["x"]))
        return F.mse_loss(net(batch["x"]), batch["y"])

    small = cut(model, batches[0]["x"])
    by_step = reconstruct(small, lambda: batches, step=step, num_batches=2)
    assert seen == [20, 20]
    by_inputs = reconstruct(small, lambda: [b["x"] for b in batches], num_batches=2)
    assert error(by_step.module, by_inputs.module, batches[2]["x"]) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = seeded(lambda: Chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))).to(dtype)
    x = torch.randn(100, 4).to(dtype)
    small = cut(model, x)
    fitted = reconstruct(small, lambda: [x])
    assert next(fitted.module.parameters()).dtype == dtype
    assert error(model, fitted.module, x) < error(model, small.module, x)


# ---------------------------------------------------------------------------------------------------------- bad inputs


def ready() -> tuple[Program, Pruned, Tensor]:
    model = seeded(lambda: Chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    x = torch.randn(30, 4)
    small = cut(model, x)
    return small.program, small, x


@pytest.mark.parametrize("options", [{"ridge": -1.0}, {"ridge": float("nan")}, {"num_batches": 0}, {"layers": "some"}])
def test_bad_options(options: dict[str, Any]) -> None:
    _, small, x = ready()
    with pytest.raises(UsageError, match=next(iter(options))):
        reconstruct(small, lambda: [x], **options)


def test_no_batches() -> None:
    _, small, _ = ready()
    with pytest.raises(RejectedError, match="at least one batch"):
        reconstruct(small, list)


def test_activations_that_are_not_finite() -> None:
    _, small, x = ready()
    x[3, 1] = float("nan")
    with pytest.raises(RejectedError, match="finite"):
        reconstruct(small, lambda: [x])


def test_a_module_of_another_plan() -> None:
    _, small, x = ready()
    other = dataclasses.replace(small.plan, keep={**small.plan.keep, "layers.2.weight": {1: (0, 1, 2, 4)}})
    with pytest.raises(UsageError):
        reconstruct(dataclasses.replace(small, plan=other), lambda: [x])
    wide = dataclasses.replace(small, module=seeded(lambda: Chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))))
    with pytest.raises(RejectedError, match="shapes of its plan"):
        reconstruct(wide, lambda: [x])
    turned = seeded(lambda: Chain(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 3)))
    with pytest.raises(RejectedError, match="compute what its plan's graph does"):
        reconstruct(dataclasses.replace(small, module=turned), lambda: [x])


def test_nothing_to_fit() -> None:
    _, small, x = ready()
    frozen = dataclasses.replace(small, module=seeded(lambda: small.module).requires_grad_(False))
    with pytest.raises(NothingToDo, match="find a layer to fit"):
        reconstruct(frozen, lambda: [x])


def test_a_factorized_plan_is_refused() -> None:
    _, small, x = ready()
    dropped = dataclasses.replace(small, plan=Plan(keep=small.plan.keep, drop_modules=("layers.1",)))
    with pytest.raises(UsageError, match="before modules are dropped"):
        reconstruct(dropped, lambda: [x])
