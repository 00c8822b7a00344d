"""Masks that change while the one loop trains: pruned further, or dropped here and grown there.

What is masked is zero, gathers no momentum and is not moved by weight decay; after every optimizer step it is set to
zero again, and at the end of every epoch it is counted. The masks are part of every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paredown.allocate.masks import by_output
from paredown.granularity import Granularity
from paredown.plan import Mask
from paredown.prune.schedule import GrowBy, Points
from paredown.train.loop import Hook, Training
from paredown.train.masks import Held

Kept = Mapping[str, NDArray[np.bool_]]
"""Parameter → elements that stay, the parameter's shape."""
Choose = Callable[[nn.Module, Kept, float], Kept]
"""(module, what stays now, density) → what stays from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changing:
    """When and how the masks of one training change."""

    points: Callable[[int], Points]
    """The schedule, once the number of optimizer steps of the whole training is known."""
    choose: Choose
    epochs: int
    granularity: Granularity
    moving: Callable[[int, int], float] | None = None
    """(steps done, steps in all) → share of what stays that moves: the smallest |w| are dropped, as many grown in the same weight."""
    grow_by: GrowBy = "none"
    may: Kept | None = None
    """What may be grown at all; None is everything."""
    rows: Mapping[str, int] | None = None
    """Where cells compete inside their output row, which then grows as many as it dropped: 0 for each weight [out, in, …], the
    groups of one that is stored [in, out, …]."""
    seed: int = 0


class ChangingMasks:
    """The masks of one training, chosen anew at the points of a schedule. `hook` hangs them on `fit`."""

    def __init__(self, how: Changing, kept: Kept) -> None:
        """`kept` is what the module given to `fit` has left."""
        self._how = how
        self._first = {n: torch.from_numpy(np.array(k)) for n, k in kept.items()}
        self._kept = dict(self._first)
        self._carried_out = 0
        self._steps = -1
        self._due: Points = ()
        self._gradients: dict[str, Tensor] = {}
        self.moved = 0
        """Cells that were dropped and grown elsewhere, in all."""
        self._held: tuple[int, Held] | None = None

    @property
    def kept(self) -> dict[str, NDArray[np.bool_]]:
        """What stays as of now."""
        return {n: k.cpu().numpy() for n, k in self._kept.items()}

    def hook(self, name: str) -> Hook:
        """For `fit`; the name says all options, since a checkpoint is only continued under the same name."""
        return Hook(
            name=name, after_backward=self._after_backward, after_step=self._after_step,
            after_epoch=self._after_epoch, state=self._state, restore=self._restore,
        )  # fmt: skip

    def _bound(self, training: Training) -> Held:
        if self._held is None or self._held[0] != id(training.module):
            masks = {n: Mask.of(k.cpu().numpy(), str(self._how.granularity)) for n, k in self._kept.items()}
            self._held = (id(training.module), Held(training.module, masks))
        if self._steps != training.steps * self._how.epochs:
            self._steps = training.steps * self._how.epochs
            self._due = tuple(p for p in self._how.points(self._steps) if p[0] > 0)
        return self._held[1]

    def _next(self, steps_done: int) -> tuple[int, float] | None:
        """The last point that has come and was not carried out."""
        come = [p for p in self._due if self._carried_out < p[0] <= steps_done]
        return come[-1] if come else None

    def _after_backward(self, training: Training) -> None:
        held = self._bound(training)
        if (
            self._how.moving is not None
            and self._how.grow_by == "gradient"
            and self._next(training.step + 1) is not None
        ):
            self._gradients = {n: _gradient(held.parameter(n)) for n in held.names()}
        held.zero_gradients()

    def _after_step(self, training: Training) -> None:
        held = self._bound(training)
        held.zero_weights()
        if self._due:
            training.start_loss = math.inf  # a loss that grows with the zeros is no divergence; NaN still is
        point = self._next(training.step + 1)
        if point is not None:
            self._update(training, held, point)

    def _after_epoch(self, training: Training) -> None:
        held = self._bound(training)
        if training.epoch == self._how.epochs and self._due and self._carried_out < self._due[-1][0]:
            self._update(training, held, self._due[-1])  # the last epoch was shorter than the others
        held.check()

    def _update(self, training: Training, held: Held, point: tuple[int, float]) -> None:
        step, density = point
        self._carried_out = step
        before = {n: held.kept(n).cpu().numpy() for n in held.names()}
        now = {n: k & before[n] for n, k in self._how.choose(training.module, before, density).items()}
        grows = self._how.moving is not None and (self._how.grow_by == "random" or bool(self._gradients))
        share = self._how.moving(step, self._steps) if grows and self._how.moving is not None else 0.0
        for name, kept in now.items():
            parameter = held.parameter(name)
            if share > 0:
                grown = self._moved(name, parameter, kept, share)
                _forget(training.optimizer, parameter, torch.from_numpy(grown & ~before[name]))
                kept = grown  # noqa: PLW2901
            self._kept[name] = torch.from_numpy(kept).to(parameter.device)
            held.set(name, self._kept[name])
        held.zero_weights()
        self._gradients = {}

    def _moved(self, name: str, parameter: nn.Parameter, kept: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
        """Drop the smallest cells of a weight and grow as many others; the number of cells that stay is the same."""
        cut = self._how.granularity
        may = np.ones(kept.shape, dtype=np.bool_) if self._how.may is None else self._how.may[name]
        alive, possible = cut.reduce(kept, "max") > 0, cut.reduce(may, "max") > 0
        number = min(round(share * int(alive.sum())), int(alive.sum()) - 1, int((possible & ~alive).sum()))
        if number <= 0:
            return kept
        magnitude = cut.reduce(np.abs(parameter.detach().cpu().double().numpy()))
        dropped = _lowest(np.where(alive, magnitude, np.inf), number)
        if self._how.grow_by == "gradient":
            wish = cut.reduce(np.abs(self._gradients[name].cpu().double().numpy()))
        else:
            wish = np.random.default_rng([self._how.seed, self._carried_out, *name.encode()]).random(alive.shape)
        may_grow = possible & (~alive | dropped)
        if self._how.rows is None:
            grown = _lowest(np.where(may_grow, -wish, np.inf), number)
        else:
            grown = _grown(wish, dropped, may_grow, self._how.rows[name])
        self.moved += number
        stays = kept & cut.expand(alive & ~dropped, kept.shape)
        return stays | (may & cut.expand(grown, kept.shape))

    def _state(self) -> dict[str, Tensor]:
        return {**self._kept, "carried out": torch.tensor(self._carried_out), "moved": torch.tensor(self.moved)}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        self._carried_out = int(state["carried out"]) if state else 0
        self.moved = int(state["moved"]) if state else 0
        self._kept = {n: state[n].bool() for n in self._first} if state else dict(self._first)
        self._held, self._gradients = None, {}


def _lowest(values: NDArray[Any], number: int) -> NDArray[np.bool_]:
    found = np.zeros(values.size, dtype=np.bool_)
    found[np.argsort(values, axis=None, kind="stable")[:number]] = True
    return found.reshape(values.shape)


def _grown(wish: NDArray[Any], dropped: NDArray[np.bool_], may: NDArray[np.bool_], groups: int) -> NDArray[np.bool_]:
    """As many cells of every output row as it dropped, those with the largest wish. Shapes: the grid of cells."""
    places = np.arange(wish.size).reshape(wish.shape)
    rows = by_output(places, groups) if groups else places
    rows = rows.reshape(len(rows), -1)
    order = np.argsort(np.where(may, -wish, np.inf).ravel()[rows], axis=1, kind="stable")
    first = np.arange(rows.shape[1]) < dropped.ravel()[rows].sum(axis=1, keepdims=True)
    grown = np.zeros(wish.size, dtype=np.bool_)
    grown[np.take_along_axis(rows, order, axis=1)[first]] = True
    return grown.reshape(wish.shape)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


@torch.no_grad()
def _forget(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, new: Tensor) -> None:
    """Zero what an optimizer remembers of new connections."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(new.to(value.device), 0.0)
