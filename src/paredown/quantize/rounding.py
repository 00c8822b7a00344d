"""Rounding by what it does to the layer's output: GPTQ from the inputs the quantized layer will really have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from paredown.errors import RejectedError
from paredown.program import Inputs
from paredown.quantize.decompose import fetch
from paredown.quantize.lanes import Changes, Lanes, Layer, walk
from paredown.quantize.observe import PerChannel
from paredown.statistics.inputs import inputs_of

RATIOS = torch.linspace(1.0, 0.4, 61, dtype=torch.float64)
"""Of the scale that holds the largest weight: those that are tried."""
SWEEPS = 4
_ROWS = 65_536
"""Positions of a layer that are looked at, drawn with a fixed seed; more say nearly the same."""


@dataclass(slots=True, kw_only=True)
class Moments:
    """Streamed Σ x, Σ t, Σ x xᵀ and Σ t xᵀ over positions, of inputs x [K] and wanted outputs t [out], in float64."""

    count: int
    x: Tensor
    t: Tensor
    gram: Tensor
    cross: Tensor

    @staticmethod
    def of(inputs: int, outputs: int) -> Moments:
        """Nothing seen yet."""
        zeros = [
            torch.zeros(s, dtype=torch.float64) for s in ((inputs,), (outputs,), (inputs, inputs), (outputs, inputs))
        ]
        return Moments(count=0, x=zeros[0], t=zeros[1], gram=zeros[2], cross=zeros[3])

    def add(self, x: Tensor, t: Tensor) -> None:
        """Inputs [positions, K] and targets [positions, out]."""
        x, t = x.double(), t.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.t += t.sum(0)
        self.gram += x.T @ x
        self.cross += t.T @ x

    def centred(self) -> tuple[Tensor, Tensor]:
        """Means of x xᵀ and t xᵀ, about the means of x and t: what is left once a bias is free."""
        x, t = self.x / self.count, self.t / self.count
        return self.gram / self.count - torch.outer(x, x), self.cross / self.count - torch.outer(t, x)

    def plain(self) -> tuple[Tensor, Tensor]:
        """Means of x xᵀ and t xᵀ."""
        return self.gram / self.count, self.cross / self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """Codes [out, K] (float64), scales [out], and the mean squared error of the output before and after."""

    codes: Tensor
    scales: Tensor
    nearest_error: float
    """Of rounding to the nearest with the same scales, relative to the spread of the wanted output."""
    error: float


def gptq(
    weight: Tensor, gram: Tensor, scales: Tensor, low: int, high: int, *, damping: float = 0.01, sweeps: int = SWEEPS
) -> Tensor:
    """Codes of a weight whose rounding errors cancel in the layer's output.

        min over integer q of tr((W - s q) G (W - s q)ᵀ),   low ≤ q ≤ high

    weight W [out, K], gram G [K, K] (mean of x xᵀ), scales s [out]; codes [out, K] as float64. GPTQ (Frantar et al. 2022,
    arXiv 2210.17323, algorithm 1): column after column in the order of falling G_kk, each rounded to the nearest, its
    error spread over the columns to come by the Cholesky factor of (G + λ)⁻¹, λ = damping · mean G_kk. We differ in what
    follows: `sweeps` rounds of coordinate descent on the same objective, which can only lower it.

    >>> w, g = torch.tensor([[0.4, 0.4]], dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    >>> gptq(w, g, torch.ones(1, dtype=torch.float64), -8, 7).sum().item()
    1.0
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    mixed = gram[order][:, order].clone()
    mixed.diagonal().add_(max(damping * float(mixed.diagonal().mean()), 1e-12))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(mixed)), upper=True)
    left, codes = weight[:, order].clone(), torch.empty_like(weight)
    for k in range(weight.shape[1]):
        codes[:, k] = torch.round(left[:, k] / scales).clamp(low, high)
        error = (left[:, k] - scales * codes[:, k]) / factor[k, k]
        left[:, k + 1 :] -= torch.outer(error, factor[k, k + 1 :])
    back = torch.empty_like(codes)
    back[:, order] = codes
    return _descended(weight, gram, scales, back, low, high, sweeps)


def _descended(weight: Tensor, gram: Tensor, scales: Tensor, codes: Tensor, low: int, high: int, sweeps: int) -> Tensor:
    """Coordinate descent: each code in turn to the best integer, the others as they are. Rows are independent."""
    diagonal = gram.diagonal()
    pull = (weight - scales[:, None] * codes) @ gram  # minus half the gradient by ŵ
    for _ in range(sweeps):
        moved = 0
        for k in (diagonal > 0).nonzero()[:, 0].tolist():
            best = torch.round(codes[:, k] + pull[:, k] / (diagonal[k] * scales)).clamp(low, high)
            step = best - codes[:, k]
            rows = step.nonzero()[:, 0]
            if len(rows):
                moved += len(rows)
                codes[rows, k] = best[rows]
                pull[rows] -= torch.outer(step[rows] * scales[rows], gram[k])
        if not moved:
            break
    return codes


def best_scales(weight: Tensor, gram: Tensor, low: int, high: int, floor: Tensor | None = None) -> Tensor:
    """Scales [out] of least output error of rounding to the nearest: argmin over s of (w - ŵ) G (w - ŵ)ᵀ per row.

    Tried: `RATIOS` of the scale that holds the row's largest weight. weight [out, K], gram [K, K], float64. `floor` is
    the smallest scale allowed (see bias_floor).
    """
    largest = torch.maximum(weight.amax(1) / high, weight.amin(1) / low).clamp_min(1e-30)
    whole = torch.where(weight.abs().amax(1) > 0, largest, torch.full_like(largest, 1.0 / high))
    best, least = whole.clone(), torch.full_like(whole, torch.inf)
    for ratio in RATIOS:
        scales = whole * ratio if floor is None else torch.maximum(whole * ratio, floor)
        away = weight - scales[:, None] * torch.round(weight / scales[:, None]).clamp(low, high)
        errors = ((away @ gram) * away).sum(1)
        better = errors < least
        best, least = torch.where(better, scales, best), torch.where(better, errors, least)
    return best.float().double()  # a scale is stored in float32: round on what is stored


def fitted(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """argmin ‖t - W' x‖² + λ ‖W' - W‖², λ = ridge · mean G_kk: what the layer should be on inputs that are quantized."""
    amount = max(ridge * float(gram.diagonal().mean()), 1e-12)
    mixed = gram + amount * torch.eye(len(gram), dtype=gram.dtype)
    return weight + torch.cholesky_solve((cross - weight @ gram).T, torch.linalg.cholesky(mixed)).T


def round_layers(
    prepared: fx.GraphModule, calls: Sequence[Inputs], *, damping: float = 0.01, ridge: float = 0.01
) -> dict[str, Rounded]:
    """Give every layer codes by `gptq`, one after the other, each from what the layers before it give by then.

    First the weight that answers to the quantized inputs best, then its codes; last the bias, which takes up the mean that
    is left. Changes the prepared graph; returns what was found, by the weight's attribute. Raises RejectedError
    where activations are not finite.
    """
    changes, found = Changes(), {}

    def visit(layer: Layer, lanes: Sequence[Lanes]) -> None:
        observer = fetch(prepared, layer.observer)
        assert isinstance(observer, PerChannel)
        weight = fetch(prepared, layer.weight).detach()
        rows = weight.double().reshape(layer.groups, weight.shape[0] // layer.groups, -1)
        sums = _moments(layer, lanes, rows)
        parts = [
            _rounded(w, m, observer, layer, g, damping, ridge) for g, (w, m) in enumerate(zip(rows, sums, strict=True))
        ]
        scales = torch.cat([p.scales for p in parts])
        values = torch.cat([p.codes * p.scales[:, None] for p in parts])
        changes.weights[layer.weight] = values.float().reshape(weight.shape)
        changes.scales[layer.observer] = scales.float()
        if layer.bias is not None:
            values = values.reshape(rows.shape)
            shift = [m.t / m.count - v @ (m.x / m.count) for m, v in zip(sums, values, strict=True)]
            changes.biases[layer.bias] = torch.cat(shift).float()
        found[layer.weight] = Rounded(
            codes=torch.cat([p.codes for p in parts]),
            scales=scales,
            nearest_error=sum(p.nearest_error for p in parts) / len(parts),
            error=sum(p.error for p in parts) / len(parts),
        )

    walk(prepared, calls, changes, visit)
    return found


def _moments(layer: Layer, lanes: Sequence[Lanes], rows: Tensor) -> list[Moments]:
    sums = [Moments.of(rows.shape[2], rows.shape[1]) for _ in range(layer.groups)]
    generator = torch.Generator().manual_seed(0)
    outputs = [lane.whole.env[layer.node] for lane in lanes]
    axis = layer.use.axis
    total = sum(t.numel() // t.shape[axis] for t in outputs)
    for lane, t in zip(lanes, outputs, strict=True):
        wanted = t.movedim(axis, -1).reshape(-1, t.shape[axis])
        start = 0
        for x in inputs_of(lane.coded.env[layer.source], layer.use):
            number = len(x) if total <= _ROWS else max(1, round(len(x) * _ROWS / total))
            drawn = torch.randperm(len(x), generator=generator)[:number] if number < len(x) else slice(None)
            part = wanted[start : start + len(x)][drawn].reshape(number, layer.groups, -1)
            start += len(x)
            for group, one in enumerate(sums):
                one.add(x[drawn, group], part[:, group])
    if not all(bool(torch.isfinite(m.cross).all()) for m in sums):
        msg = f"activations must be finite to round by. Got NaN or infinity at {layer.weight}. Look for NaN in the samples."
        raise RejectedError(msg)
    return sums


def _rounded(
    weight: Tensor, seen: Moments, observer: PerChannel, layer: Layer, group: int, damping: float, ridge: float
) -> Rounded:
    low, high = observer.quant_min, observer.quant_max
    gram, cross = seen.centred() if layer.bias is not None else seen.plain()
    wanted = fitted(weight, gram, cross, ridge)
    floor = observer.floor
    if floor is not None:
        floor = floor.double().reshape(layer.groups, -1)[group]
    scales = best_scales(wanted, gram, low, high, floor)
    nearest = torch.round(wanted / scales[:, None]).clamp(low, high)
    codes = gptq(wanted, gram, scales, low, high, damping=damping)
    spread = float((wanted @ gram * wanted).sum()) or 1.0

    def error(q: Tensor) -> float:
        away = wanted - scales[:, None] * q
        return float((away @ gram * away).sum()) / spread

    return Rounded(codes=codes, scales=scales, nearest_error=error(nearest), error=error(codes))
