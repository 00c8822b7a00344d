"""Criteria by the Hessian at operations whose backward torch cannot differentiate: the same functions written out, or a clear refusal."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import paredown as pare

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)) * 2


class Tiny(nn.Module):
    """Two layers with a function between them that the tests change."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.between = nn.Linear(6, 5), nn.Linear(5, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum() / len(x)


def scored(net: nn.Module, criterion: str, granularity: str = "row", loss: Any = squares, **options: Any) -> Any:
    program = pare.capture(net.eval(), X[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that were trained, which grasp is not meant for
        return pare.score(
            program, pare.couple(program), criterion, granularity=granularity, batches=[X], loss=loss, **options
        ).by_cell


def hessian(net: nn.Module, loss: Any = squares) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian in float64 by torch.autograd.functional, of all parameters in one vector."""
    net = net.double()
    names, shapes = zip(*((n, p.shape) for n, p in net.named_parameters()), strict=True)
    at = torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    def value(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        state = {n: t.view(s) for n, t, s in zip(names, parts, shapes, strict=True)}
        return loss(lambda x: functional_call(net, state, (x,)), X.double())

    return torch.autograd.functional.jacobian(value, at), torch.autograd.functional.hessian(value, at)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "module": (nn.Hardsigmoid(), lambda x: (x / 6 + 0.5).clamp(0, 1)),
    "in place": (nn.Hardsigmoid(inplace=True), lambda x: (x / 6 + 0.5).clamp(0, 1)),
    "functional": (functional.hardsigmoid, lambda x: (x / 6 + 0.5).clamp(0, 1)),
    "gate": (lambda x: x * functional.hardsigmoid(x, inplace=False), lambda x: x * (x / 6 + 0.5).clamp(0, 1)),
    "distances": (
        lambda x: torch.cdist(x, torch.eye(5, dtype=x.dtype)),
        lambda x: (x[:, None] - torch.eye(5, dtype=x.dtype)).square().sum(-1).sqrt(),
    ),
    "distances by one": (
        lambda x: torch.cdist(x, 3 * torch.eye(5, dtype=x.dtype), p=1.0),
        lambda x: (x[:, None] - 3 * torch.eye(5, dtype=x.dtype)).abs().sum(-1),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_torch_cannot_differentiate_twice_is_written_out(name: str) -> None:
    """grasp is w · H g exactly; hessian_trace comes near the true diagonal."""
    function, written_out = FUNCTIONS[name]
    gradient, whole = hessian(Tiny(written_out))
    weights = torch.cat([torch.full((n,), float(k)) for n, k in ((30, 1), (5, 0), (15, 1), (3, 0))])
    flat = torch.cat([p.detach().reshape(-1) for p in Tiny(written_out).double().parameters()])
    wanted = (flat * (whole @ (gradient * weights)))[:30].view(5, 6)
    found = scored(Tiny(function), "grasp", "element", temperature=1.0, mode="eval")["a.weight"]
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    traces = whole.diagonal()[:30].view(5, 6).sum(1) / 12 * flat[:30].view(5, 6).square().sum(1) / 6
    found = scored(Tiny(function), "hessian_trace", probes=150)["a.weight"]
    np.testing.assert_allclose(found, traces, rtol=0.1, atol=0.25 * float(traces.abs().max()))


def test_the_value_and_the_slope_are_those_of_torch() -> None:
    from paredown.score.twice import TwiceDifferentiable

    x = torch.cat([torch.linspace(-7, 7, 57), torch.tensor([-3.0, 3.0, 0.0, float("inf"), -float("inf")])])
    results = []
    for mode in (False, True):
        at = x.clone().requires_grad_()
        with TwiceDifferentiable() if mode else torch.enable_grad():
            y = functional.hardsigmoid(at)
        results.append((y.detach(), torch.autograd.grad(y.sum(), at)[0]))
    torch.testing.assert_close(*[r[0] for r in results], rtol=0, atol=0)
    torch.testing.assert_close(*[r[1] for r in results], rtol=1e-6, atol=0)


class Alphabet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(6, 20)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(20, 20))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).view(-1, 5, 4)


def alignment(model: Any, x: Tensor) -> Tensor:
    logs = model(x).transpose(0, 1).log_softmax(-1)
    lengths = torch.full((len(x),), 2)
    return functional.ctc_loss(logs, torch.ones(len(x), 2, dtype=torch.long), torch.full((len(x),), 5), lengths)


@pytest.mark.parametrize("criterion", ["hessian_trace", "grasp"])
def test_a_loss_without_a_second_derivative_is_told(criterion: str) -> None:
    with pytest.raises(pare.errors.RejectedError) as told:
        scored(Alphabet(), criterion, loss=alignment)
    for part in (criterion, "differentiate twice", "ctc_loss", "in the loss", "taylor2", "fisher"):
        assert part in str(told.value)


class _Once(torch.autograd.Function):
    """x², of which nobody may take a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x if torch.compiler.is_compiling() else _Once.apply(x)  # type: ignore[no-any-return]


def test_the_module_whose_function_has_none_is_named() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Sequential(Square()), nn.Linear(5, 3))
    with pytest.raises(pare.errors.RejectedError, match=r"at 1\.0 \(Square\)"):
        scored(net, "hessian_trace")
