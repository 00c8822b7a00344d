"""hessian_trace: mean curvature of a group times its size (Yu et al. 2022, "Hessian-aware pruning", eq. 8).

Tr(H_u) / (2 n) · ‖w_u‖² over the n elements of a unit or cell u, the trace by Hutchinson: mean of v ⊙ H v over seeded vectors
v of ±1. Batch norms run on their stored statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paredown.errors import UsageError
from paredown.score.gradients import Gradients, wide
from paredown.score.nouns import Computed, Elements, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class HessianTraceOptions:
    """How well the trace is estimated."""

    probes: int = 4
    """Vectors per batch: products with the Hessian, each as dear as a backward pass or two."""

    def __post_init__(self) -> None:
        if isinstance(self.probes, bool) or not isinstance(self.probes, int) or self.probes < 1:
            msg = f"probes must be an integer ≥ 1. Got {self.probes!r}."
            raise UsageError(msg)


def hessian_trace(source: Source, options: HessianTraceOptions) -> Iterator[tuple[Elements, ...]]:
    """Two maps: the estimated diagonal of H, averaged over batches and probes, and w²."""
    gradients = Gradients(source, "hessian_trace")
    diagonal = gradients.accumulators()
    count = 0
    for number, batch in gradients.batches():
        generator = torch.Generator().manual_seed((source.seed + number) % 2**63)
        vectors = [[_signs(p, generator) for p in gradients.distinct] for _ in range(options.probes)]
        for v, found in zip(vectors, gradients.hessian_products(batch, number, vectors), strict=True):
            for parameter, sign, product in zip(gradients.distinct, v, found, strict=True):
                diagonal[id(parameter)].add_(wide(product) * sign)
            count += 1

    def curvature(name: str) -> Tensor:
        return (diagonal[id(gradients.parameters[name])] / count).cpu()

    yield Computed(source.weights, curvature), Computed(source.weights, lambda n: wide(source.weights[n]).square())


def _signs(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """±1 in a byte each: the vectors of all probes are held together."""
    draws = torch.randint(0, 2, tuple(parameter.shape), generator=generator, dtype=torch.int8)
    return draws.mul_(2).sub_(1)


def finish(parts: Sequence[Any], size: Any, options: HessianTraceOptions) -> Any:
    """Tr(H_u) / (2 n) · ‖w_u‖²."""
    del options
    return parts[0] / (2 * size) * parts[1]
