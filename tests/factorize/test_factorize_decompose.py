"""Factors of one weight: identities, the layer oracles with their negative control, convolutions through unfold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.errors import RejectedError, UsageError
from paredown.factorize.decompose import Factoring, core_energies, energies, factors_of
from paredown.plan import Rank
from paredown.program import capture
from paredown.prune.factors import Layer, found, links, most_ranks, product

SEEDS = range(5)


@dataclass(frozen=True)
class Inputs:
    """Statistics as the definition says them, from the inputs themselves."""

    absolute_means: Any
    gram: Any


def seen_of(columns: Tensor) -> Inputs:
    """Of inputs as columns, [groups, K, positions]."""
    return Inputs(
        absolute_means=columns.abs().double().mean(-1),
        gram=(columns.double() @ columns.double().mT) / columns.shape[-1],
    )


def only_layer(net: nn.Module, inputs: Tensor) -> tuple[Layer, Tensor]:
    program = capture(net, inputs, train=False)
    (layer,) = found(program).layers.values()
    return layer, program.state[layer.parameter].detach()


def linear(out: int, depth: int, seed: int = 0) -> tuple[Layer, Tensor]:
    torch.manual_seed(seed)
    return only_layer(nn.Linear(depth, out, bias=False).double(), torch.zeros(2, depth, dtype=torch.float64))


def correlated(depth: int, tokens: int, seed: int) -> Tensor:
    """Inputs with a power-law spectrum in a random basis, and 4 outlier channels 15 times as large."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(depth, depth, generator=generator, dtype=torch.float64)).Q
    spread = torch.arange(1, depth + 1, dtype=torch.float64) ** -0.5
    columns = basis @ (spread[:, None] * torch.randn(depth, tokens, generator=generator, dtype=torch.float64))
    columns[torch.randperm(depth, generator=generator)[:4]] *= 15
    return columns


def output_error(weight: Tensor, other: Tensor, columns: Tensor) -> float:
    return float(((weight - other) @ columns).square().sum() / (weight @ columns).square().sum())


def errors(kind: str, removed: float, seed: int) -> dict[str, float]:
    """Relative output error of a 256 × 256 Gaussian layer on 4096 tokens, by method."""
    generator = torch.Generator().manual_seed(1000 + seed)
    columns = correlated(256, 4096, seed) if kind == "corr" else torch.randn(256, 4096, generator=generator).double()
    layer, _ = linear(256, 256)
    weight = torch.randn(256, 256, generator=generator).double() / 16
    rank = int((1 - removed) * 256 * 256 / 512)
    out = {}
    for method in ("svd", "asvd", "svd_llm"):
        factors = factors_of(layer, weight, Rank(method=method, ranks=(rank,)), seen=seen_of(columns[None]))
        out[method] = output_error(weight, factors[1] @ factors[0], columns)
    return out


@pytest.mark.parametrize("removed", [0.2, 0.5])
def test_layer_oracle_on_correlated_inputs(removed: float) -> None:
    found_errors = [errors("corr", removed, seed) for seed in SEEDS]
    mean = {m: float(np.mean([e[m] for e in found_errors])) for m in found_errors[0]}
    assert mean["svd_llm"] <= 0.5 * mean["asvd"], mean
    assert mean["asvd"] <= 0.4 * mean["svd"], mean
    assert 0.1 < mean["svd"] < 0.5  # a baseline that is already perfect would make this empty


@pytest.mark.parametrize("removed", [0.2, 0.5])
def test_layer_oracle_negative_control_on_white_inputs(removed: float) -> None:
    """Data holds nothing here: a method that wins has looked at what it should not, or its baseline is broken."""
    found_errors = [errors("iid", removed, seed) for seed in SEEDS]
    mean = {m: float(np.mean([e[m] for e in found_errors])) for m in found_errors[0]}
    for method in ("asvd", "svd_llm"):
        assert 0.85 <= mean[method] / mean["svd"] <= 1.15, mean


@pytest.mark.parametrize(("out", "depth"), [(24, 40), (40, 24), (32, 32)])
def test_dropped_energies_are_the_error_of_the_outputs(out: int, depth: int) -> None:
    layer, weight = linear(out, depth)
    columns = correlated(depth, 500, 3)
    seen = seen_of(columns[None])
    spectrum = energies(layer, weight, "svd_llm", seen=seen)
    for rank in (1, 7, 23):
        first, last = factors_of(layer, weight, Rank(method="svd_llm", ranks=(rank,)), seen=seen)
        error = ((weight - last @ first) @ columns).square().sum() / 500
        assert torch.allclose(error, spectrum[rank:].sum(), rtol=1e-8)
        assert float(error) > 1e-6


def test_svd_llm_equals_the_textbook_form_with_a_cholesky_factor() -> None:
    layer, weight = linear(20, 30)
    columns = correlated(30, 400, 1)
    gram = columns @ columns.mT / 400
    root = torch.linalg.cholesky(gram)
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    for rank in (3, 11):
        textbook = u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank] @ torch.linalg.inv(root)
        first, last = factors_of(layer, weight, Rank(method="svd_llm", ranks=(rank,)), seen=seen_of(columns[None]))
        assert torch.allclose(last @ first, textbook, atol=1e-9)


def test_no_other_matrix_of_that_rank_is_better_on_the_data() -> None:
    layer, weight = linear(12, 16)
    columns = correlated(16, 300, 5)
    first, last = factors_of(layer, weight, Rank(method="svd_llm", ranks=(4,)), seen=seen_of(columns[None]))
    best = output_error(weight, last @ first, columns)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        a = last + 0.03 * torch.randn(last.shape, generator=generator, dtype=torch.float64)
        b = first + 0.03 * torch.randn(first.shape, generator=generator, dtype=torch.float64)
        assert output_error(weight, a @ b, columns) > best


def test_svd_and_asvd_against_numpy() -> None:
    layer, weight = linear(18, 25)
    columns = correlated(25, 200, 2)
    scales = np.diag(np.abs(columns.numpy()).mean(1) ** 0.7 + 1e-6)
    for method, before, after in (
        ("svd", np.eye(25), np.eye(25)),
        ("asvd", scales, np.linalg.inv(scales)),
    ):
        u, s, vt = np.linalg.svd(weight.numpy() @ before, full_matrices=False)
        wanted = (u[:, :6] * s[:6]) @ vt[:6] @ after
        rank = Rank(method=method, ranks=(6,))
        first, last = factors_of(layer, weight, rank, seen=seen_of(columns[None]), how=Factoring(alpha=0.7))
        assert np.allclose((last @ first).numpy(), wanted, atol=1e-9)
        spectrum = energies(layer, weight, method, seen=seen_of(columns[None]), how=Factoring(alpha=0.7))
        assert np.allclose(spectrum.numpy(), s**2, atol=1e-9)


@pytest.mark.parametrize("method", ["svd", "asvd", "svd_llm"])
def test_factors_are_balanced(method: str) -> None:
    layer, weight = linear(18, 25)
    first, last = factors_of(layer, weight, Rank(method=method, ranks=(9,)), seen=seen_of(correlated(25, 200, 2)[None]))
    assert torch.allclose(last.norm(dim=0), first.norm(dim=1), rtol=1e-9)


def test_inputs_that_never_move_and_dead_rows_do_no_harm() -> None:
    layer, weight = linear(12, 8)
    weight = weight.clone()
    weight[3] = 0
    columns = torch.zeros(1, 8, 50, dtype=torch.float64)
    columns[:, :3] = torch.randn(1, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for method in ("svd", "asvd", "svd_llm"):
        first, last = factors_of(layer, weight, Rank(method=method, ranks=(8,)), seen=seen_of(columns))
        assert torch.allclose(last @ first, weight, atol=1e-7)  # full rank is the weight itself, data or not
        first, last = factors_of(layer, weight, Rank(method=method, ranks=(4,)), seen=seen_of(columns))
        assert bool(torch.isfinite(last @ first).all())
    first, last = factors_of(layer, weight, Rank(method="svd_llm", ranks=(3,)), seen=seen_of(columns))
    assert output_error(weight, last @ first, columns[0]) < 1e-12  # three inputs move: rank 3 is enough


# ------------------------------------------------------------------------------------------------------- convolutions


def conv_layer(**options: Any) -> tuple[nn.Conv2d, Layer, Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, (3, 2), **options).double()
    layer, weight = only_layer(conv, torch.zeros(2, 8, 9, 9, dtype=torch.float64))
    return conv, layer, weight


def unfolded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Input patches as columns, by group. Shape [groups, in / groups · taps, positions]."""
    patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
    return patches.transpose(0, 1).reshape(conv.groups, patches.shape[1] // conv.groups, -1)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "groups": 4}])
def test_a_convolution_on_data_loses_what_its_unfolded_matrix_loses(options: dict[str, Any]) -> None:
    """svd_llm through the im2col Gram; the outputs come from F.conv2d, not from the matrix."""
    conv, layer, weight = conv_layer(**options)
    x = torch.randn(6, 8, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).cumsum(3)
    columns = unfolded(conv, x)
    seen = seen_of(columns)
    spectrum = energies(layer, weight, "svd_llm", seen=seen)
    for rank in range(1, most_ranks(layer.shape, layer.conv, "svd_llm")[0]):
        chosen = Rank(method="svd_llm", ranks=(rank,))
        value = x
        for factor, link in zip(
            factors_of(layer, weight, chosen, seen=seen), links(layer.shape, layer.conv, chosen), strict=True
        ):
            assert link.conv is not None
            value = F.conv2d(
                value, factor, None, link.conv.stride, link.conv.padding, link.conv.dilation, link.conv.groups
            )
        dense = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
        error = float((dense - value).square().sum()) / columns.shape[-1]
        assert error == pytest.approx(float(spectrum[rank:].sum()), rel=1e-7)
        assert error > 1e-9


def test_tucker_error_of_every_pair_of_ranks_and_sweeps_that_never_lose() -> None:
    _, layer, weight = conv_layer(groups=2)
    held = core_energies(layer, weight)
    assert held.shape == (4, 6)
    for a in (1, 2, 4):
        for b in (1, 3, 6):
            rank = Rank(method="tucker2", ranks=(a, b))
            errors = []
            for sweeps in (0, 1, 5):
                factors = factors_of(layer, weight, rank, how=Factoring(sweeps=sweeps))
                errors.append(float((product(factors, "tucker2", 2) - weight).square().sum()))
            assert errors[0] == pytest.approx(float(held[-1, -1] - held[a - 1, b - 1]), abs=1e-12)
            assert errors[1] <= errors[0] + 1e-12
            assert errors[2] <= errors[1] + 1e-12


def test_spatial_svd_is_the_best_sum_of_separable_kernels() -> None:
    _, layer, weight = conv_layer()
    matrix = weight.permute(1, 2, 0, 3).reshape(8 * 3, 12 * 2).numpy()
    sigma = np.linalg.svd(matrix, compute_uv=False)
    assert np.allclose(energies(layer, weight, "spatial_svd").numpy(), sigma**2)
    factors = factors_of(layer, weight, Rank(method="spatial_svd", ranks=(5,)))
    whole = product(factors, "spatial_svd", 1)
    assert float((whole - weight).square().sum()) == pytest.approx(float((sigma[5:] ** 2).sum()))
    assert torch.allclose(factors[0].flatten(1).norm(dim=1), factors[1].transpose(0, 1).flatten(1).norm(dim=1))


# --------------------------------------------------------------------------------------------------------- bad inputs


def test_numbers_that_are_none_are_refused() -> None:
    layer, weight = linear(6, 5)
    rank = Rank(method="svd_llm", ranks=(2,))
    broken = weight.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(RejectedError, match="weights of weight must be finite"):
        factors_of(layer, broken, Rank(method="svd", ranks=(2,)))
    with pytest.raises(RejectedError, match="inputs of weight must be finite"):
        factors_of(
            layer, weight, rank, seen=Inputs(absolute_means=torch.ones(1, 5), gram=torch.full((1, 5, 5), torch.inf))
        )
    with pytest.raises(RejectedError, match="must be given batches"):
        factors_of(layer, weight, rank)
    with pytest.raises(RejectedError, match="must be given batches"):
        factors_of(layer, weight, Rank(method="asvd", ranks=(2,)))


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (Rank(method="svd", ranks=(7,)), r"at most \(5,\)"),
        (Rank(method="svd", ranks=(2, 2)), "must be 1"),
        (Rank(method="tucker2", ranks=(2, 2)), "a convolution"),
        (Rank(method="spatial_svd", ranks=(2,)), "a 2-D convolution"),
        (Rank(method="cp", ranks=(2,)), "must be one of svd"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(rank: Rank, said: str) -> None:
    layer, weight = linear(6, 5)
    with pytest.raises(UsageError, match=said):
        factors_of(layer, weight, rank)


@pytest.mark.parametrize("options", [{"alpha": -1}, {"alpha": True}, {"sweeps": -1}, {"sweeps": 1.5}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Factoring(**options)
