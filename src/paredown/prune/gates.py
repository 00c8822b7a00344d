"""Channel gates: which channels are worth having, learnt while the weights stand still (Wang et al. 2020, "Pruning from scratch").

One gate λ_u in [0, 1] per unit scales what its batch norms give (γ and β; rows of weights and biases where there is none).
Weights, random or not, stay as they are; the gates alone are trained, by Adam, on the user's loss + balance × (mean λ - ratio)².
The gates are scores: a global threshold on them meets the budget, and the structure is then trained.

Where we differ: gates of a residual stream are one, as its channels are; the last gates are taken, not the best of many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from paredown.couple import Coupling, Space
from paredown.errors import UsageError
from paredown.program import Program
from paredown.score import Scores
from paredown.score.bn_scale import batch_norm_scales
from paredown.train.loop import Hook, Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """Options of criterion "gates"."""

    epochs: int = 2
    lr: float = 0.01
    ratio: float = 0.5
    """Where the mean gate is drawn to."""
    balance: float = 0.5
    start: float = 0.5
    """All gates at the beginning."""

    def __post_init__(self) -> None:
        rules = [
            ("epochs", self.epochs >= 1, "a number ≥ 1"),
            ("lr", self.lr > 0, "a number > 0"),
            ("ratio", 0 < self.ratio < 1, "a share in (0, 1)"),
            ("balance", self.balance >= 0, "a number ≥ 0"),
            ("start", 0 < self.start <= 1, "in (0, 1]"),
        ]
        for name, holds, rule in rules:
            if not holds:
                msg = f"{name} of gates must be {rule}. Got {getattr(self, name)!r}."
                raise UsageError(msg)


class _Place(NamedTuple):
    """Where a space's gates act: along one axis of one parameter."""

    parameter: str
    axis: int
    indices: Tensor
    """[units, per unit]."""


class ChannelGates:
    """The gates of one training; `hook` hangs them on `fit`, `scores` are what they became."""

    def __init__(self, program: Program, coupling: Coupling, how: Gates) -> None:
        """Raises UsageError where no unit is free."""
        parameters = set(program.eval_graph.graph_signature.parameters)
        scales = batch_norm_scales(program)
        self._how = how
        self._places = {s.name: _places(s, parameters, scales) for s in coupling.spaces}
        if not self._places:
            msg = "gates must have a free channel to close. Got a model with none. See `paredown couple`."
            raise UsageError(msg)
        shapes = {n: tuple(program.state[n].shape) for n in parameters}
        self._dense = {
            p.parameter: program.state[p.parameter].detach().clone() for ps in self._places.values() for p in ps
        }
        assert all(self._dense[n].shape == shapes[n] for n in self._dense)
        self._gates = {s.name: torch.full((len(s),), how.start) for s in coupling.spaces}
        self._moments = {f"{k}/{n}": torch.zeros_like(g) for n, g in self._gates.items() for k in ("first", "second")}
        self._number = 0
        self._first = self._state()

    def scores(self) -> Scores:
        """Gates by space, as scores."""
        by_space = {n: g.double().numpy().copy() for n, g in self._gates.items()}
        return Scores(criterion="gates", by_space=by_space, options={"epochs": self._how.epochs, "lr": self._how.lr})

    def hook(self) -> Hook:
        """For `fit`. Gates act on the module's tensors; weights get no gradient."""
        return Hook(
            name=f"gates {self._how!r}", after_backward=self._learn, after_step=self._act,
            state=self._state, restore=self._restore,
        )  # fmt: skip

    @torch.no_grad()
    def set(self, module: nn.Module) -> None:
        """Scale a module's tensors by the gates as they are."""
        parameters = dict(module.named_parameters(remove_duplicate=False))
        now = {n: t.clone() for n, t in self._dense.items()}
        for space, places in self._places.items():
            for place in places:
                factor = torch.ones(now[place.parameter].shape[place.axis])
                factor[place.indices] = self._gates[space].unsqueeze(1).expand(place.indices.shape)
                now[place.parameter] = now[place.parameter] * _along(factor, place, now[place.parameter])
        for name, tensor in now.items():
            parameters[name].copy_(tensor)

    @torch.no_grad()
    def _learn(self, training: Training) -> None:
        """dL/dλ_u = Σ over what the gate scales of dL/d(λ_u p) × p, the other gates on the same element included."""
        parameters = dict(training.module.named_parameters(remove_duplicate=False))
        self._number += 1
        total = sum(len(g) for g in self._gates.values())
        mean = sum(float(g.sum()) for g in self._gates.values()) / total
        pull = 2 * self._how.balance * (mean - self._how.ratio) / total
        for space, places in self._places.items():
            gradient = torch.full_like(self._gates[space], pull)
            for place in places:
                parameter = parameters[place.parameter]
                if parameter.grad is None:
                    continue
                here = (parameter.grad.cpu() * self._undone(space, place)).movedim(place.axis, 0)
                gradient += here.reshape(len(here), -1).sum(1)[place.indices].sum(1)
            self._adam(space, gradient)
        for parameter in parameters.values():
            parameter.grad = None

    def _undone(self, space: str, place: _Place) -> Tensor:
        """The element with all gates on it but this one: two spaces may gate one weight, along different axes."""
        value = self._dense[place.parameter]
        for other, places in self._places.items():
            for each in places:
                if each.parameter == place.parameter and (other != space or each.axis != place.axis):
                    factor = torch.ones(value.shape[each.axis])
                    factor[each.indices] = self._gates[other].unsqueeze(1).expand(each.indices.shape)
                    value = value * _along(factor, each, value)
        return value

    def _adam(self, space: str, gradient: Tensor) -> None:
        first, second = self._moments[f"first/{space}"], self._moments[f"second/{space}"]
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        spread = (second / (1 - 0.999**self._number)).sqrt().add_(1e-8)
        gates = self._gates[space].addcdiv_(first, spread, value=-self._how.lr / (1 - 0.9**self._number))
        gates.clamp_(0.0, 1.0)

    def _act(self, training: Training) -> None:
        self.set(training.module)

    def _state(self) -> dict[str, Tensor]:
        gates = {f"gate/{n}": g.clone() for n, g in self._gates.items()}
        moments = {n: m.clone() for n, m in self._moments.items()}
        return {**gates, **moments, "number": torch.tensor(self._number)}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        state = state or self._first
        self._gates = {n: state[f"gate/{n}"].clone() for n in self._gates}
        self._moments = {n: state[n].clone() for n in self._moments}
        self._number = int(state["number"])


def _places(space: Space, parameters: set[str], scales: set[str]) -> tuple[_Place, ...]:
    """γ and β of the space's batch norms; else the rows of its writing weights and their biases."""
    writes = [f for f in space.footprints if f.role == "write" and f.parameter in parameters]
    norms = {n.rpartition(".")[0] for f in writes if (n := f.parameter) in scales}
    mine = [f for f in writes if f.parameter.rpartition(".")[0] in norms] if norms else writes
    return tuple(
        _Place(parameter=f.parameter, axis=f.axis, indices=torch.from_numpy(np.asarray(f.indices))) for f in mine
    )


def _along(factor: Tensor, place: _Place, like: Tensor) -> Tensor:
    """The factors of one axis, shaped to multiply the whole tensor."""
    shape = [1] * like.dim()
    shape[place.axis] = -1
    return factor.reshape(shape).to(like.dtype)
