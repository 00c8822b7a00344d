"""Amounts: everything a budget can be given in, from how many units of each space are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paredown.allocate.meter import Counts, Floats, Meter
from paredown.allocate.search import Gap
from paredown.allocate.sensitivity import Latency
from paredown.couple.space import Coupling
from paredown.examine.cost import Cost

NAMES = ("channels", "parameters", "macs", "size_bytes", "latency_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """Amounts of a model by kept units. Parameters and MACs are exact; bytes and milliseconds are estimates."""

    meter: Meter
    width: Floats
    """Channels of one unit, by space; 0 for spaces that do not compete."""
    names: tuple[str, ...]
    bytes_per_parameter: float
    dense_bytes: float
    latency: Latency | None = None

    @classmethod
    def of_model(cls, coupling: Coupling, cost: Cost, competing: Sequence[bool], latency: Latency | None) -> Amounts:
        """The amounts of a model, of whose spaces those in `competing` count as channels."""
        width = np.array(
            [s.width * c for s, c in zip(coupling.spaces, competing, strict=True)], dtype=np.float64
        ).reshape(len(coupling.spaces))
        return cls(
            meter=Meter(coupling, cost),
            width=width,
            names=tuple(s.name for s in coupling.spaces),
            bytes_per_parameter=cost.parameter_bytes / max(cost.parameters, 1),
            dense_bytes=float(cost.state_dict_bytes or cost.parameter_bytes),
            latency=latency,
        )

    def at(self, name: str, counts: Counts | Floats) -> Floats:
        """One amount for kept counts [..., spaces]; shape [...]."""
        if name == "channels":
            return np.asarray(counts @ self.width)
        if name == "latency_ms":
            return self._latency(counts)
        amounts = self.meter.of(counts)
        if name == "size_bytes":
            gone = self.meter.parameters - amounts[..., 0]
            return np.asarray(self.dense_bytes - gone * self.bytes_per_parameter)
        return np.asarray(amounts[..., 0 if name == "parameters" else 1])

    def dense(self, name: str) -> float:
        """The amount of the model as it is."""
        return float(self.at(name, self.meter.units))

    def gap(self, given: Mapping[str, float | int]) -> Gap:
        """How far above a budget, as a fraction of the dense amount: the worst of those given."""
        dense = {name: max(self.dense(name), 1e-12) for name in given}
        goals = {n: v / dense[n] if isinstance(v, int) or n == "latency_ms" else v for n, v in given.items()}

        def gap(counts: NDArray[np.int64]) -> Floats:
            parts = [self.at(name, counts) / dense[name] - goal for name, goal in goals.items()]
            return np.asarray(np.max(parts, axis=0))

        return gap

    def _latency(self, counts: Counts | Floats) -> Floats:
        assert self.latency is not None  # a budget in milliseconds is refused without a table
        units = dict(zip(self.names, self.meter.units.tolist(), strict=True))
        kept = {name: counts[..., number] for number, name in enumerate(self.names)}
        return np.broadcast_to(self.latency.total(units, kept), counts.shape[:-1])
