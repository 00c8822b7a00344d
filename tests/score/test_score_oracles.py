"""Every criterion against what it says it measures, worked out by other means; and every granularity of every criterion."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import paredown as pare
from paredown.score import TABLE
from paredown.score.reduce import share_of_larger

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(12, 6, generator=GENERATOR) @ torch.randn(6, 6, generator=GENERATOR)
Y = torch.arange(12) % 3
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def small() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def elements(criterion: str, net: nn.Module | None = None, granularity: str = "element", **options: Any) -> Any:
    net = net or small()
    x = X.to(next(net.parameters()).dtype)
    program = pare.capture(net, x[:2])
    batches = [(x[:6], Y[:6]), (x[6:], Y[6:])]
    return pare.score(
        program, pare.couple(program), criterion, granularity=granularity, batches=batches, loss=loss, **options
    ).by_cell


def flat_loss(net: nn.Module, at: Tensor, x: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
    """The loss as a function of all parameters in one vector."""
    parts = dict(zip(NAMES, at.split([30, 5, 15, 3]), strict=True))
    shapes = {n: p.shape for n, p in net.named_parameters()}
    out = functional_call(net, {n: t.view(shapes[n]) for n, t in parts.items()}, (x,))
    return nn.functional.cross_entropy(out / temperature, y)


def vector(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def split(found: Tensor) -> dict[str, Tensor]:
    parts = dict(zip(NAMES, found.split([30, 5, 15, 3]), strict=True))
    return {"0.weight": parts["0.weight"].view(5, 6), "2.weight": parts["2.weight"].view(3, 5)}


def close(found: Any, wanted: dict[str, Tensor], rtol: float = 2e-4) -> None:
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        scale = float(values.abs().max())
        assert scale > 0
        np.testing.assert_allclose(found[name], values.numpy(), rtol=rtol, atol=rtol * scale)


# ---------------------------------------------------------------------------------------------------------- gradients


def per_sample() -> Tensor:
    """Gradient of every sample alone, by forward differences' exact cousin: one autograd call each. Shape [12, 53]."""
    net = small()
    rows = []
    for i in range(12):
        at = vector(net).requires_grad_()
        (row,) = torch.autograd.grad(flat_loss(net, at, X[i : i + 1], Y[i : i + 1]), at)
        rows.append(row)
    return torch.stack(rows)


def test_fisher_is_half_the_mean_square_of_single_gradients_times_w_squared() -> None:
    close(elements("fisher"), split(0.5 * per_sample().square().mean(0) * vector(small()).square()))


def test_taylor2_is_the_second_order_change_of_one_weight_going_to_zero() -> None:
    w, g = vector(small()), per_sample()
    close(elements("taylor2"), split((g.mean(0) * w - 0.5 * g.square().mean(0) * w * w).abs()))


def test_snip_is_the_slope_in_a_gate_by_differences() -> None:
    net = small().double()
    w = vector(net)
    step = 1e-5
    slopes = torch.zeros_like(w)
    for i in range(len(w)):
        up, down = w.clone(), w.clone()
        up[i] *= 1 + step
        down[i] *= 1 - step
        change = [flat_loss(net, at, X.double(), Y) for at in (up, down)]
        slopes[i] = (change[0] - change[1]) / (2 * step)
    close(elements("snip"), split(slopes.abs()))


def test_grasp_and_hessian_trace_by_the_whole_hessian() -> None:
    """w · H g at the temperature; and Hutchinson's estimate comes near the true diagonal, summed over a row."""
    net = small().double()
    w = vector(net).requires_grad_()
    x = X.double()
    warm = lambda at: flat_loss(net, at, x, Y, 200.0)  # noqa: E731
    hessian = torch.autograd.functional.hessian(warm, w)
    (gradient,) = torch.autograd.grad(warm(w), w)
    gradient = torch.cat([g * (len(g) > 5) for g in gradient.split([30, 5, 15, 3])])  # weights alone, as in the paper
    close(elements("grasp", net), split(w.detach() * (hessian @ gradient)), rtol=1e-6)
    plain = torch.autograd.functional.hessian(lambda at: flat_loss(net, at, x, Y), w)
    diagonal, squares = split(plain.diagonal()), split(w.detach().square())
    found = elements("hessian_trace", granularity="row", probes=1200)
    for name, values in diagonal.items():
        wanted = values.sum(1) / (2 * values.shape[1]) * squares[name].sum(1) / values.shape[1]
        np.testing.assert_allclose(found[name], wanted, rtol=0.05, atol=0.08 * float(wanted.abs().max()))


# ------------------------------------------------------------------------------------------------------------ weights


def test_lamp_is_the_share_of_all_that_is_as_large() -> None:
    net = small()
    weight = net[0].weight.detach().double()
    wanted = [[float(v**2 / sum(u**2 for u in weight.reshape(-1) if u**2 >= v**2)) for v in row] for row in weight]
    np.testing.assert_allclose(elements("lamp", net)["0.weight"], wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shares_of_equal_scores_are_equal_and_zeros_stay(dtype: Any) -> None:
    """Few values, many ties, and the signed zero that sorts last by its bits."""
    scores = (np.random.default_rng(0).integers(0, 5, 60) / 4).astype(dtype)
    scores[7] = -0.0
    plain = scores.tolist()
    wanted = [v / sum(u for u in plain if u >= v) if v else 0.0 for v in plain]
    found = share_of_larger(scores)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert share_of_larger(np.zeros(0, dtype)).shape == (0,)
    assert not share_of_larger(np.zeros((2, 2), dtype)).any()


def test_geometric_median_is_the_sum_of_distances() -> None:
    net = small()
    with torch.no_grad():
        net[0].weight[4] = net[0].weight[1]  # of two equal rows each is near
    rows = net[0].weight.detach().double()
    wanted = [sum(float((a - b).norm()) for b in rows) for a in rows]
    found = elements("geometric_median", net, "row")["0.weight"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert found[1] == pytest.approx(found[4])


def test_largest_weight() -> None:
    found = elements("linf", granularity="row")["0.weight"]
    np.testing.assert_allclose(found, [max(abs(v) for v in row) for row in small()[0].weight.tolist()], rtol=1e-6)


def test_synflow_is_conserved_from_layer_to_layer() -> None:
    """Σ of the scores of each layer of a chain without biases is the same R = 1ᵀ |W₃| |W₂| |W₁| 1 (Tanaka et al., theorem 1),
    once for each of the two samples that the model was captured with."""
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)
    )
    found = elements("synflow", net)
    one = torch.ones(6, dtype=torch.float64)
    for layer in (0, 2, 4):
        one = net[layer].weight.detach().double().abs() @ one  # type: ignore[union-attr,operator]
    for name in ("0.weight", "2.weight", "4.weight"):
        assert float(found[name].sum()) == pytest.approx(2 * float(one.sum()), rel=1e-6)


# -------------------------------------------------------------------------------------------------------- activations

CONVOLUTIONS = {
    "linear": (nn.Linear(6, 4), (40, 6)),
    "stride and padding": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 3, 7, 7)),
    "groups and dilation": (nn.Conv2d(4, 6, 2, dilation=2, groups=2), (3, 4, 6, 6)),
    "depthwise": (nn.Conv2d(3, 3, 3, groups=3), (4, 3, 6, 6)),
}


def positions(layer: nn.Module, x: Tensor) -> Tensor:
    """What each output multiplies, by group. Shape [groups, positions, K], float64."""
    if isinstance(layer, nn.Linear):
        return x.double()[None]
    assert isinstance(layer, nn.Conv2d)
    options: Any = {n: getattr(layer, n) for n in ("dilation", "padding", "stride")}
    return torch.stack(
        [
            nn.functional.unfold(part.double(), layer.kernel_size, **options).transpose(1, 2).flatten(0, 1)  # type: ignore[arg-type]
            for part in x.chunk(layer.groups, dim=1)
        ]
    )


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_wanda_and_obs_of_any_layer(name: str) -> None:
    """Wanda: |w| times the norm of what it multiplies. OBS: the least rise of the layer's squared error when a weight is
    gone and the rest of its row answers, by least squares; a row that leaves takes all of its output along."""
    layer, shape = CONVOLUTIONS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    program = pare.capture(nn.Sequential(layer, nn.ReLU()), x)
    weight: Tensor = layer.weight.detach().double()  # type: ignore[union-attr,operator]
    seen = positions(layer, x)
    per_group = len(weight) // len(seen)

    def scored(criterion: str, granularity: str, **options: Any) -> Any:
        coupling = pare.couple(program)
        batches = [x[: len(x) // 2], x[len(x) // 2 :]]
        found = pare.score(program, coupling, criterion, granularity=granularity, batches=batches, **options)
        return found.by_cell["0.weight"]

    norms = torch.stack([seen[o // per_group].square().mean(0).sqrt() for o in range(len(weight))])
    wanted = weight.abs() * norms.view_as(weight)
    np.testing.assert_allclose(scored("wanda", "element"), wanted, rtol=1e-4)
    whole, single = scored("obs", "row", damping=0.0), scored("obs", "element", damping=0.0)
    for o in range(len(weight)):
        inputs, row = seen[o // per_group], weight[o].reshape(-1)
        output = inputs @ row
        assert whole[o] == pytest.approx(float(output.square().mean()) / row.numel(), rel=1e-4)
        for j in (0, row.numel() - 1):
            others = [k for k in range(row.numel()) if k != j]
            answer = torch.linalg.lstsq(inputs[:, others], output[:, None], driver="gelsd").solution[:, 0]
            rise = float((output - inputs[:, others] @ answer).square().mean())
            assert single.reshape(len(weight), -1)[o, j] == pytest.approx(rise, rel=1e-3)


def test_activations_are_counted_where_the_channel_is_seen() -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3))
    x = torch.randn(6, 3, 8, 8)
    program = pare.capture(net, x[:2])
    with torch.no_grad():
        alive = net[1](net[0](x)).double()
    share = {"apoz": (alive > 0).double().mean((0, 2, 3)), "mean_activation": alive.abs().mean((0, 2, 3))}
    for criterion, wanted in share.items():
        found = pare.score(program, pare.couple(program), criterion, batches=[x[:2], x[2:]]).by_space["0.weight[0]"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


# -------------------------------------------------------------------------------------------- every granularity of all


class Separable(nn.Module):
    """A depthwise and a pointwise convolution, norms, an attention block: weights of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.point = nn.Conv2d(8, 16, 1)
        self.block = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.deep(self.norm(self.stem(x)).relu())).relu()
        return self.head(self.block(x.flatten(2).transpose(1, 2)).mean(1))


@pytest.fixture(scope="module")
def separable() -> tuple[pare.Program, pare.Coupling, list[tuple[Tensor, Tensor]]]:
    net = Separable().eval()
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    program = pare.capture(net, x)
    return program, pare.couple(program), [(x, torch.arange(4))]


GRID = {"element": (8, 3, 3, 3), "2:4": (8, 3, 3, 3), "row": (8,), "column": (27,), "kernel": (8, 3), "4x4": (2, 7)}
WITHOUT = {
    "bn_scale": ("row",),
    "refit": (),
    "geometric_median": ("row", "column"),
    "apoz": ("row",),
    "mean_activation": ("row",),
}


@pytest.mark.parametrize("criterion", TABLE)
def test_every_granularity_is_scored_or_refused_with_what_is_served(criterion: str, separable: Any) -> None:
    program, coupling, batches = separable
    served = WITHOUT.get(criterion, tuple(GRID))
    for granularity, grid in (*GRID.items(), ("head", ()), ("channel", ())):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = pare.score(
                    program,
                    coupling,
                    criterion,
                    granularity=granularity,
                    batches=batches,
                    loss=loss,
                    weights_given=True,
                )
            except pare.UsageError as error:
                assert granularity not in served and grid
                assert "must be used with" in str(error)
                continue
        if not grid:
            kinds = {s.kind for s in coupling.spaces if s.name in found.by_space}
            assert "head" in kinds and (granularity == "channel" or kinds == {"head"})
            values = list(found.by_space.values())
        else:
            assert granularity in served
            assert found.by_cell["stem.weight"].shape == grid
            values = list(found.by_cell.values())
        assert all(np.isfinite(v).all() for v in values)


# ------------------------------------------------------------------------------------------------------ what may go wrong


def test_fault_26_a_channel_whose_norm_is_zero_scores_nothing() -> None:
    """γ = 0: nothing of the channel is left after its norm, so bn_scale is 0 and so is every product with the gradient of γ."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)).eval()
    with torch.no_grad():
        net[1].weight[2] = 0.0
        net[1].bias[2] = 0.0
    x = torch.randn(2, 3, 7, 7)
    program = pare.capture(net, x)
    coupling = pare.couple(program)
    data = {"batches": [x], "loss": lambda m, b: m(b).square().mean()}
    for criterion, group in (("bn_scale", "write"), ("taylor", "write"), ("fisher", "all")):
        found = pare.score(program, coupling, criterion, group=group, **data).by_space["0.weight[0]"]  # type: ignore[arg-type]
        assert found[2] == 0.0
        assert (np.delete(found, 2) > 0).all()


def orders() -> Iterator[Any]:
    for criterion in ("l1", "l2", "linf", "lamp", "synflow"):
        for allocation in ("uniform", "global"):
            yield criterion, allocation


@pytest.mark.parametrize(("criterion", "allocation"), orders())
def test_fault_27_of_equal_weights_the_first_leave(criterion: str, allocation: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.5)
    program = pare.capture(net, torch.zeros(2, 4))
    coupling = pare.couple(program)
    scores = pare.score(program, coupling, criterion, granularity="element")
    budget = pare.Budget(density=0.5)
    plan = pare.allocate(coupling, scores, pare.examine(program), budget, allocation=allocation, floor=0.0)
    kept = np.concatenate(
        [plan.masks[n].kept.reshape(-1) if n in plan.masks else np.ones(16, bool) for n in ("0.weight", "1.weight")]
    )
    in_all = [False] * 15 + [True, False] + [True] * 15  # no layer is ever emptied
    wanted = in_all if allocation == "global" else ([False] * 8 + [True] * 8) * 2
    assert kept.tolist() == wanted


@pytest.mark.parametrize("granularity", ["row", "column", "kernel", "2x2"])
def test_obs_of_cells_has_no_conditioned_diagonal(granularity: str) -> None:
    with pytest.raises(pare.errors.UsageError, match=f"Got 'conditioned' with granularity {granularity}"):
        elements("obs", granularity=granularity, diagonal="conditioned")


class InOut(nn.Module):
    """A transposed convolution of two groups and a product, both with weights stored [in, out, …]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.product = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).mean((2, 3)).relu() @ self.product


def test_obs_of_cells_stored_in_out() -> None:
    """tr(W_B ([H⁻¹]_BB)⁻¹ W_Bᵀ) with B the *inputs* of a cell, by numpy; not w²."""
    torch.manual_seed(3)
    net, x = InOut().eval(), torch.randn(32, 4, 2, 2) @ torch.randn(2, 2)
    x = torch.einsum("nchw,cd->ndhw", x, torch.randn(4, 4))
    program = pare.capture(net, x[:2], train=False)

    def scored(granularity: str) -> Any:
        return pare.score(
            program, pare.couple(program), "obs", granularity=granularity, batches=[x], damping=0.0
        ).by_cell

    h = net.up(x).mean((2, 3)).relu().detach().double().numpy()
    held, weight = np.linalg.inv(h.T @ h / len(h)), net.product.detach().double().numpy()
    wanted = np.zeros((3, 2))
    for i, o in np.ndindex(3, 2):
        part = weight[2 * i : 2 * i + 2, 2 * o : 2 * o + 2]
        inside = np.linalg.inv(held[2 * i : 2 * i + 2, 2 * i : 2 * i + 2])
        wanted[i, o] = np.trace(part.T @ inside @ part) / 4
    np.testing.assert_allclose(scored("2x2")["product"], wanted, rtol=1e-4)
    kernels = scored("kernel")
    np.testing.assert_allclose(kernels["product"], weight**2 / np.diag(held)[:, None], rtol=1e-4)
    taps = (net.up.weight.detach().double().numpy() ** 2).mean((2, 3))
    for group in range(2):
        seen = x[:, 2 * group : 2 * group + 2].movedim(1, -1).flatten(0, 2).double().numpy()
        diagonal = np.diag(np.linalg.inv(seen.T @ seen / len(seen)))
        rows = slice(2 * group, 2 * group + 2)
        np.testing.assert_allclose(kernels["up.weight"][rows], taps[rows] / diagonal[:, None], rtol=1e-4)


@pytest.mark.parametrize("granularity", ["row", "column", "kernel", "2x2", "2x3", "4x1"])
@pytest.mark.parametrize("samples", [5, 64])
def test_obs_of_cells_by_the_whole_inverse_however_few_positions_were_seen(granularity: str, samples: int) -> None:
    """tr(W_B ([H⁻¹]_BB)⁻¹ W_Bᵀ) by numpy from the whole H⁻¹; with 5 samples (20 patches of 27 inputs) none is made."""
    torch.manual_seed(6)
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(samples, 3, 4, 4)
    program = pare.capture(nn.Sequential(layer, nn.ReLU()), x, train=False)
    given = {"granularity": granularity, "batches": [x], "positions_per_sample": 4}
    found = pare.score(program, pare.couple(program), "obs", **given).by_cell["0.weight"]  # type: ignore[arg-type]
    patches = positions(layer, x)[0].double().numpy()
    assert (len(patches) < patches.shape[1]) == (samples == 5)
    h = patches.T @ patches / len(patches)
    h += 0.01 * h.diagonal().mean() * np.eye(len(h))
    inverse, weight = np.linalg.inv(h), layer.weight.detach().double().flatten(1).numpy()
    width = {"row": 27, "column": 1, "kernel": 9, "2x2": 2, "2x3": 3, "4x1": 1}[granularity]
    tall = {"column": 4, "2x2": 2, "2x3": 2, "4x1": 4}.get(granularity, 1)
    wanted = np.zeros((4 // tall, -(-27 // width)))
    for i, j in np.ndindex(wanted.shape):
        part = weight[tall * i : tall * (i + 1), width * j : width * (j + 1)]
        columns = slice(width * j, width * (j + 1))
        wanted[i, j] = np.trace(part @ np.linalg.inv(inverse[columns, columns]) @ part.T) / part.size
    np.testing.assert_allclose(np.reshape(found, wanted.shape), wanted, rtol=1e-6)
