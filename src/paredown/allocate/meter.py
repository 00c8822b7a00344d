"""Meter: parameters and MACs from how many units of each space are kept; vectorised, and exact in integers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paredown.couple.space import Coupling, Indices
from paredown.examine.cost import Cost

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Removed = Sequence[NDArray[np.bool_]]
"""For each space which units leave. Shape [units]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """One axis that shrinks: of a parameter, or of a product of activations."""

    length: int
    per: dict[int, float]
    """Positions that one unit of a space takes with it, on average."""
    places: Indices | None = None
    """Of a product: (space, unit) of every position, -1 where it is fixed. Shape [length, 2]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Term:
    """A product of axis lengths: the elements of one parameter, or the MACs of one product of activations."""

    axes: tuple[int, ...]
    fixed: int
    """The dense amount divided by the dense lengths of those axes."""
    is_parameter: bool
    macs: int
    """MACs per element."""


class Meter:
    """What a model costs for any number of kept units per space; all units of a space cost the same.

    Kept length of an axis = dense length - Σ removed units × positions per unit; a parameter has the product of its
    kept lengths elements, a node rows × elements MACs, a product of activations MACs by the lengths of its own axes.
    """

    def __init__(self, coupling: Coupling, cost: Cost) -> None:
        self.units: Counts = np.array([len(s) for s in coupling.spaces], dtype=np.int64)
        self._axes, of_parameter = _parameter_axes(coupling, cost)
        rate = rates(coupling, cost)
        self._terms: list[_Term] = []
        loose = [0, 0]  # parameters and MACs that no space touches
        for name, shape in cost.parameter_shapes.items():
            elements, axes = math.prod(shape), of_parameter.get(name, ())
            if not axes:
                loose[0] += elements
                loose[1] += elements * rate.get(name, 0)
                continue
            fixed = elements // math.prod(self._axes[a].length for a in axes)
            self._terms.append(_Term(axes=axes, fixed=fixed, is_parameter=True, macs=rate.get(name, 0)))
        counted = sum(rate.get(n, 0) * math.prod(s) for n, s in cost.parameter_shapes.items())
        loose[1] += cost.macs - counted - self._products(coupling, cost)
        self._loose = (loose[0], loose[1])
        self._arrays(len(coupling.spaces))
        self.parameters, self.macs = self.exact([np.zeros(n, dtype=np.bool_) for n in self.units])

    def _products(self, coupling: Coupling, cost: Cost) -> int:
        """Add a term for every product of activations that shrinks; returns their dense MACs."""
        total = 0
        for node in cost.by_node:
            vectors = [v for v in coupling.products.get(node.node, ()) if (v[:, 0] >= 0).any()]
            dense = math.prod(len(v) for v in vectors)
            if not vectors or node.macs % dense:
                continue
            first = len(self._axes)
            self._axes += [_product_axis(v, self.units) for v in vectors]
            axes = tuple(range(first, len(self._axes)))
            self._terms.append(_Term(axes=axes, fixed=node.macs // dense, is_parameter=False, macs=1))
            total += node.macs
        return total

    def _arrays(self, num_spaces: int) -> None:
        self._dense: Floats = np.array([a.length for a in self._axes], dtype=np.float64)
        self._matrix: Floats = np.zeros((len(self._axes), num_spaces))
        for number, axis in enumerate(self._axes):
            for space, per in axis.per.items():
                self._matrix[number, space] = per
        self._flat = np.array([a for t in self._terms for a in t.axes], dtype=np.int64)
        self._starts = np.cumsum([0, *(len(t.axes) for t in self._terms)])[:-1].astype(np.int64)
        rows = [[t.fixed * t.is_parameter for t in self._terms], [t.fixed * t.macs for t in self._terms]]
        self._weights: Floats = np.array(rows, dtype=np.float64)

    def of(self, kept: Counts | Floats) -> Floats:
        """Parameters and MACs for kept counts [..., spaces]; shape [..., 2]."""
        base = np.array(self._loose, dtype=np.float64)
        if not self._terms:
            return np.broadcast_to(base, (*kept.shape[:-1], 2)).copy()
        lengths = self._dense - (self.units - kept) @ self._matrix.T
        amounts = np.multiply.reduceat(lengths[..., self._flat], self._starts, axis=-1)
        return np.asarray(amounts @ self._weights.T + base)

    def exact(self, removed: Removed) -> tuple[int, int]:
        """Parameters and MACs in integers for the units that leave."""
        gone = [int(r.sum()) for r in removed]
        kept = []
        for axis in self._axes:
            if axis.places is None:
                kept.append(axis.length - sum(int(per) * gone[s] for s, per in axis.per.items()))
                continue
            leaving = sum(int(removed[s][axis.places[axis.places[:, 0] == s, 1]].sum()) for s in axis.per)
            kept.append(axis.length - leaving)
        parameters, macs = self._loose
        for term in self._terms:
            elements = term.fixed * math.prod(kept[a] for a in term.axes)
            parameters += elements * term.is_parameter
            macs += elements * term.macs
        return parameters, macs


def _parameter_axes(coupling: Coupling, cost: Cost) -> tuple[list[_Axis], dict[str, tuple[int, ...]]]:
    """Axes of parameters (not buffers) that spaces touch, and the numbers of those of each parameter."""
    touched: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for number, space in enumerate(coupling.spaces):
        for f in space.footprints:
            if f.parameter in cost.parameter_shapes:
                per = touched[(f.parameter, f.axis)]
                per[number] = per.get(number, 0) + f.indices.shape[1]
    axes: list[_Axis] = []
    of_parameter: dict[str, list[int]] = defaultdict(list)
    for (name, axis), per in touched.items():
        of_parameter[name].append(len(axes))
        axes.append(_Axis(length=cost.parameter_shapes[name][axis], per=per))
    return axes, {n: tuple(a) for n, a in of_parameter.items()}


def _product_axis(places: Indices, units: Counts) -> _Axis:
    spaces = places[:, 0]
    per = {int(s): float((spaces == s).sum() / units[s]) for s in np.unique(spaces[spaces >= 0])}
    return _Axis(length=len(places), per=per, places=places)


def rates(coupling: Coupling, cost: Cost) -> dict[str, int]:
    """MACs per element of every parameter that MACs are proportional to: Σ rows over the nodes that use it."""
    rates: dict[str, int] = defaultdict(int)
    for node in cost.by_node:
        if not node.weights or any((v[:, 0] >= 0).any() for v in coupling.products.get(node.node, ())):
            continue
        elements = sum(math.prod(cost.parameter_shapes[w]) for w in node.weights)
        if elements and node.macs % elements == 0:
            for weight in node.weights:
                rates[weight] += node.macs // elements
    return rates
