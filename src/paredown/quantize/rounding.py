"""Rounding by what it does to the layer's output: GPTQ from the inputs the quantized layer will really have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from paredown.errors import RejectedError
from paredown.program import Inputs
from paredown.quantize.decompose import fetch
from paredown.quantize.lanes import Changes, Lanes, Layer, walk
from paredown.quantize.numerics import ODD, scales_of_least_error, snap
from paredown.quantize.pairs import within
from paredown.statistics.inputs import inputs_of

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
    wanted: Tensor
    """[out, K] (float64): the weight that was rounded, fitted to the inputs that the layer really has."""
    bias: Tensor
    """[out]: what gives the output the mean that it has in float."""
    nearest_error: float
    """Of rounding to the nearest with the same scales, relative to the spread of the wanted output."""
    error: float


def gptq(
    weight: Tensor,
    gram: Tensor,
    scales: Tensor,
    low: int,
    high: int,
    *,
    kept: Tensor | None = None,
    damping: float = 0.01,
    sweeps: int = SWEEPS,
) -> Tensor:
    """Codes of a weight whose rounding errors cancel in the layer's output.

        min over integer q of tr((W - s q) G (W - s q)ᵀ),   low ≤ q ≤ high

    weight W [out, K], gram G [K, K] (mean of x xᵀ), scales s [out]; codes [out, K] as float64. GPTQ (Frantar et al. 2022,
    arXiv 2210.17323, algorithm 1): column after column in the order of falling G_kk, each rounded to the nearest, its
    error spread over the columns to come by the Cholesky factor of (G + λ)⁻¹, λ = damping · mean G_kk. We differ in what
    follows: `sweeps` rounds of coordinate descent on the same objective, which can only lower it. Where `kept` is False the code
    is 0, and what it cost is spread like any other error (SparseGPT, arXiv 2301.00774, algorithm 1 with a mask).

    >>> w, g = torch.tensor([[0.4, 0.4]], dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    >>> gptq(w, g, torch.ones(1, dtype=torch.float64), -8, 7).sum().item()
    1.0
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    mixed = gram[order][:, order].clone()
    mixed.diagonal().add_(max(damping * float(mixed.diagonal().mean()), 1e-12))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(mixed)), upper=True)
    left, codes = weight[:, order].clone(), torch.empty_like(weight)
    stays = None if kept is None else kept[:, order]
    for k in range(weight.shape[1]):
        codes[:, k] = torch.round(left[:, k] / scales).clamp(low, high)
        if stays is not None:
            codes[:, k] *= stays[:, k]
        error = (left[:, k] - scales * codes[:, k]) / factor[k, k]
        left[:, k + 1 :] -= torch.outer(error, factor[k, k + 1 :])
    back = torch.empty_like(codes)
    back[:, order] = codes
    least, most = torch.full_like(back, low), torch.full_like(back, high)
    if kept is not None:
        least, most = least * kept, most * kept
    return _descended(weight, gram, scales, back, least, most, sweeps)


def _descended(
    weight: Tensor, gram: Tensor, scales: Tensor, codes: Tensor, low: Tensor, high: Tensor, sweeps: int
) -> Tensor:
    """Coordinate descent: each code in turn to the best integer, the others as they are. Rows are independent."""
    diagonal = gram.diagonal()
    pull = (weight - scales[:, None] * codes) @ gram  # minus half the gradient by ŵ
    for _ in range(sweeps):
        moved = 0
        for k in (diagonal > 0).nonzero()[:, 0].tolist():
            best = torch.round(codes[:, k] + pull[:, k] / (diagonal[k] * scales))
            best = torch.minimum(torch.maximum(best, low[:, k]), high[:, k])
            step = best - codes[:, k]
            rows = step.nonzero()[:, 0]
            if len(rows):
                moved += len(rows)
                codes[rows, k] = best[rows]
                pull[rows] -= torch.outer(step[rows] * scales[rows], gram[k])
        if not moved:
            break
    return codes


def adaround(
    weight: Tensor,
    gram: Tensor,
    scales: Tensor,
    low: int,
    high: int,
    *,
    kept: Tensor | None = None,
    iterations: int = 1000,
    lr: float = 0.05,
    strength: float = 0.01,
) -> Tensor:
    """Codes of a weight, each rounded up or down as gradient descent finds best for the layer's output.

        min over V of ‖(W - Ŵ) x‖² + λ Σ (1 - |2 h(V) - 1|^β),   Ŵ = s clip(⌊W / s⌋ + h(V), low, high)
        h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), started at the fraction of W / s

    weight W [out, K], gram G [K, K], scales s [out]; codes [out, K] as float64. Adam; β falls from 20 to 2 after a fifth of
    the iterations, before which λ is 0 (Nagel et al. 2020, arXiv 2004.10568, equations 21 to 24). We differ in that the
    error is taken over all positions at once, by G, and before the activation function, and in the end: rounds of
    coordinate descent between up and down, which Adam's answer is only near to.
    """
    ratio = (weight / scales[:, None]).float()
    down = ratio.floor()
    fraction = (ratio - down).clamp(0.0, 1.0)
    raw = -torch.log(1.2 / (fraction + 0.1) - 1)
    spread = (gram.diagonal().mean() * scales.square().mean()).clamp_min(1e-30)
    mixed, steps = (gram / spread).float(), scales.float()[:, None]
    with torch.enable_grad():
        raw = raw.requires_grad_(True)
        optimizer = torch.optim.Adam([raw], lr=lr)
        for number in range(iterations):
            up = (1.2 * torch.sigmoid(raw) - 0.1).clamp(0.0, 1.0)
            codes = (down + up).clamp(low, high)
            away = weight.float() - steps * (codes if kept is None else codes * kept)
            loss = ((away @ mixed) * away).sum() / len(weight)
            share = (number / iterations - 0.2) / 0.8
            if share > 0:
                beta = 2 + 18 * 0.5 * (1 + math.cos(math.pi * share))
                loss = loss + strength * (1 - (2 * up - 1).abs() ** beta).sum() / len(weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    codes = (down + (raw.detach() >= 0)).clamp(low, high).double()
    least, most = down.clamp(low, high).double(), (down + 1).clamp(low, high).double()
    if kept is not None:
        codes, least, most = codes * kept, least * kept, most * kept
    return _descended(weight, gram, scales, codes, least, most, SWEEPS)


def _solved_within(wanted: Tensor, gram: Tensor, amount: float, kept: Tensor, steps: int = 60) -> Tensor:
    """Rows V with (V G + λ V) = wanted at their kept entries, and 0 elsewhere."""
    found, left, way = torch.zeros_like(wanted), wanted.clone(), wanted.clone()
    size = left.square().sum(1)
    least = 1e-20 * size.clamp_min(1e-300)
    for _ in range(steps):
        step = (way @ gram + amount * way) * kept
        length = torch.where(size > least, size / (way * step).sum(1).clamp_min(1e-300), torch.zeros_like(size))
        found += length[:, None] * way
        left -= length[:, None] * step
        now = left.square().sum(1)
        way = left + (now / size.clamp_min(1e-300))[:, None] * way
        size = now
        if not bool((size > least).any()):
            break
    return found


METHODS: Mapping[str, Callable[..., Tensor]] = {"gptq": gptq, "adaround": adaround}


def fitted(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float, kept: Tensor | None = None) -> Tensor:
    """argmin ‖t - W' x‖² + λ ‖W' - W‖², λ = ridge · mean G_kk: what the layer should be on inputs that are quantized.

    With `kept` the weights that are not stay zero: each row has a system of its own, solved by conjugate gradients.
    """
    amount = max(ridge * float(gram.diagonal().mean()), 1e-12)
    if kept is not None:
        return weight + _solved_within((cross - weight @ gram) * kept, gram, amount, kept)
    mixed = gram + amount * torch.eye(len(gram), dtype=gram.dtype)
    return weight + torch.cholesky_solve((cross - weight @ gram).T, torch.linalg.cholesky(mixed)).T


def round_layers(
    prepared: fx.GraphModule, calls: Sequence[Inputs], *, method: str = "gptq", ridge: float = 0.01
) -> dict[str, Rounded]:
    """Give every layer codes by `method`, "gptq" or "adaround", one after the other, each from what the layers before it give by then.

    First the weight that answers to the quantized inputs best, then its codes; last the bias, which takes up the mean that
    is left. Changes the prepared graph; returns what was found, by the weight's attribute. Raises RejectedError
    where activations are not finite.
    """
    changes, found = Changes(), {}

    def visit(layer: Layer, lanes: Sequence[Lanes]) -> None:
        found[layer.weight] = round_layer(prepared, layer, lanes, changes, method=method, ridge=ridge)

    walk(prepared, calls, changes, visit)
    return found


def round_layer(
    prepared: fx.GraphModule,
    layer: Layer,
    lanes: Sequence[Lanes],
    changes: Changes,
    *,
    method: str = "gptq",
    ridge: float = 0.01,
) -> Rounded:
    """One layer of `round_layers`, when a walk has come to it; `changes` receives its codes."""
    observer: Any = fetch(prepared, layer.observer)
    weight = fetch(prepared, layer.weight).detach()
    rows = weight.double().reshape(layer.groups, weight.shape[0] // layer.groups, -1)
    parts = rounded_rows(rows, moments_of(layer, lanes, rows), observer, layer.bias is not None, method, ridge)
    scales = torch.cat([p.scales for p in parts])
    values = torch.cat([p.codes * p.scales[:, None] for p in parts])
    changes.weights[layer.weight] = values.float().reshape(weight.shape)
    changes.scales[layer.observer] = scales.float()
    if layer.bias is not None:
        changes.biases[layer.bias] = torch.cat([p.bias for p in parts]).float()
    return Rounded(
        codes=torch.cat([p.codes for p in parts]),
        scales=scales,
        wanted=torch.cat([p.wanted for p in parts]),
        bias=torch.cat([p.bias for p in parts]),
        nearest_error=sum(p.nearest_error for p in parts) / len(parts),
        error=sum(p.error for p in parts) / len(parts),
    )


def moments_of(layer: Layer, lanes: Sequence[Lanes], rows: Tensor) -> list[Moments]:
    """What `rounded_rows` needs of the samples, one per group of the layer. Raises RejectedError where they are not finite."""
    sums = [Moments.of(rows.shape[2], rows.shape[1]) for _ in range(layer.groups)]
    generator = torch.Generator().manual_seed(0)
    outputs = [lane.whole.env[layer.node] for lane in lanes]
    axis = layer.use.axis
    total = sum(t.numel() // t.shape[axis] for t in outputs)
    for lane, t in zip(lanes, outputs, strict=True):
        wanted = t.movedim(axis, -1).reshape(-1, t.shape[axis])
        if layer.bias_is_given:  # the layer adds it whatever its weight becomes
            wanted = wanted - lane.whole.env[layer.node.args[2]]  # type: ignore[index]
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


def rounded_rows(
    rows: Tensor, sums: Sequence[Moments], observer: Any, with_bias: bool, method: str, ridge: float
) -> list[Rounded]:
    """Scales and codes by a method of `METHODS` for the grid of an observer; one result per group of the layer. rows [groups, out, K].

    Weights that are exactly zero were pruned, and stay so.
    """
    pruned = observer.levels not in ODD and bool((rows == 0).any())
    kept = [w != 0 if pruned else None for w in rows]
    low, high = observer.quant_min, observer.quant_max
    seen = [m.centred() if with_bias else m.plain() for m in sums]
    wanted = [fitted(w, gram, cross, ridge, k) for w, (gram, cross), k in zip(rows, seen, kept, strict=True)]
    lowest, limit = observer.lowest(), observer.limit
    floors = [None] * len(rows) if lowest is None else list(lowest.double().reshape(rows.shape[:2]))
    scales = [
        scales_of_least_error(w, low, high, gram=gram, floor=f, levels=observer.levels)
        for w, (gram, _), f in zip(wanted, seen, floors, strict=True)
    ]
    if observer.one_scale:
        largest = torch.stack(scales).max()
        scales = [largest.expand_as(s) for s in scales]
    found = []
    for w, s, moments, (gram, _), k in zip(wanted, scales, sums, seen, kept, strict=True):
        if observer.levels in ODD:  # odd codes 2u + 1: integers u on the grid of 2s that is shifted by s
            codes = 2 * METHODS[method](w - s[:, None], gram, 2 * s, (low - 1) // 2, (high - 1) // 2) + 1
        else:
            codes = METHODS[method](w, gram, s, low, high, kept=k)
            codes = codes if limit is None else within(codes, observer.weight.shape[1:], limit)
        nearest = snap(w / s[:, None], low, high, observer.levels)
        spread = float((w @ gram * w).sum()) or 1.0
        near, away = w - s[:, None] * nearest, w - s[:, None] * codes
        found.append(
            Rounded(
                codes=codes,
                scales=s,
                wanted=w,
                bias=moments.t / moments.count - (s[:, None] * codes) @ (moments.x / moments.count),
                nearest_error=float((near @ gram * near).sum()) / spread,
                error=float((away @ gram * away).sum()) / spread,
            )
        )
    return found
