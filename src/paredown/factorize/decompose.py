"""Factors of one weight and the errors of its ranks: SVD, ASVD, SVD-LLM, spatial SVD, Tucker-2, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from paredown.errors import RejectedError, UsageError
from paredown.plan import Rank
from paredown.prune.factors import Layer, links

ASVD_FLOOR = 1e-6
DAMPING = 1e-12
"""Relative to the largest eigenvalue of a Gram matrix: directions that no sample reached are ordered as without data."""


class Seen(Protocol):
    """What a layer's inputs looked like, by input of the matrix view, as paredown.statistics.InputStatistics is."""

    @property
    def absolute_means(self) -> Any:
        """Mean |x|. Shape [groups, K]."""

    @property
    def gram(self) -> Any:
        """Mean x xᵀ. Shape [groups, K, K], float64, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factoring:
    """How to factorize: options of the methods."""

    alpha: float = 0.5
    """ASVD: exponent of the mean |x|."""
    sweeps: int = 2
    """Tucker-2: sweeps of HOOI after HOSVD."""

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 2:
            msg = f"alpha must be a number in [0, 2]. Got {self.alpha!r}."
            raise UsageError(msg)
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int) or self.sweeps < 0:
            msg = f"sweeps must be an integer ≥ 0. Got {self.sweeps!r}."
            raise UsageError(msg)


NEEDS_DATA = ("asvd", "svd_llm")


def factors_of(
    layer: Layer, stored: Tensor, rank: Rank, *, seen: Seen | None = None, how: Factoring | None = None
) -> tuple[Tensor, ...]:
    """The factors of a weight at a rank, in order of execution, float64, in the shapes of `links`.

    svd: W ≈ U_r S_r V_rᵀ. asvd: SVD_r(W D) D⁻¹ with D = diag(mean |x|)^α + 1e-6 (Yuan 2023, arXiv 2312.05821).
    svd_llm: the best W' of rank r for ‖WX − W'X‖, which is P_r P_rᵀ W with P the principal axes of WX: the same as
    SVD_r(W L) L⁻¹ with G = L Lᵀ (Wang 2024, arXiv 2403.07378), without an inverse of L. spatial_svd: SVD of the weight
    as [in · k_h, out · k_w]. tucker2: leading singular vectors along both channel axes, then HOOI (Kim 2016). The two
    factors of an SVD are balanced: column i of the last and row i of the first have one norm. Groups: each its own.

    Raises UsageError (ranks that do not fit), RejectedError (no data, or NaN in it or in the weights).
    """
    how = how or Factoring()
    chain = links(layer.shape, layer.conv, rank)
    matrices = layer.matrices(_finite(stored, f"weights of {layer.parameter}"))
    parts: tuple[Tensor, ...]
    if rank.method == "tucker2":
        parts = _tucker(_by_channel(layer, matrices), rank.ranks[0], rank.ranks[1], how.sweeps)
    elif rank.method == "spatial_svd":
        parts = _spatial(layer, matrices, rank.ranks[0])
    else:
        last, first = _truncated(layer, matrices, rank, seen, how)
        parts = (first, last)
    return tuple(p.reshape(link.shape).contiguous() for p, link in zip(parts, chain, strict=True))


def energies(
    layer: Layer, stored: Tensor, method: str, *, seen: Seen | None = None, how: Factoring | None = None
) -> Tensor:
    """What each rank holds, descending: dropping all from i on costs Σ_{j≥i} energies[j]. float64 [most ranks].

    svd and spatial_svd: σ², error ‖W − W'‖². asvd: σ² of W D. svd_llm: σ² of W G^½: error E‖Wx − W'x‖², exactly.
    Groups are summed, since all of them get one rank. For tucker2 see `core_energies`.
    """
    how = how or Factoring()
    matrices = layer.matrices(_finite(stored, f"weights of {layer.parameter}"))
    if method == "svd_llm" and matrices.shape[1] <= matrices.shape[2]:
        values: Tensor = torch.linalg.eigvalsh(matrices @ _gram(layer, seen) @ matrices.mT)
        return values.flip(-1).clamp_min(0).sum(0)
    if method == "svd_llm":
        matrices = matrices @ _root(_gram(layer, seen))
    elif method == "asvd":
        matrices = matrices * _scales(layer, seen, how)[:, None, :]
    elif method == "spatial_svd":
        matrices = _spread(layer, matrices)
    return _energies(matrices)


def core_energies(layer: Layer, stored: Tensor) -> Tensor:
    """Energy of a convolution's Tucker core at every pair of ranks: error of HOSVD = its last entry − entry [a-1, b-1].

    Cumulative sums of the squared core in the basis of all singular vectors. Shape [in / groups, out / groups].
    """
    weight = _by_channel(layer, layer.matrices(_finite(stored, f"weights of {layer.parameter}")))
    ins, outs = _leading(weight, 2), _leading(weight, 1)
    core = torch.einsum("gosk,gob,gsa->gabk", weight, outs, ins)
    return core.square().sum((0, 3)).cumsum(0).cumsum(1)


# ------------------------------------------------------------------------------------------------------- two factors


def _truncated(layer: Layer, matrices: Tensor, rank: Rank, seen: Seen | None, how: Factoring) -> tuple[Tensor, Tensor]:
    """(last, first) of a matrix method, [g, out, r] and [g, r, K]."""
    (r,) = rank.ranks
    if rank.method == "svd_llm":
        axes = _output_axes(matrices, _gram(layer, seen))[..., :r]
        return _balanced(axes, axes.mT @ matrices)
    scales = _scales(layer, seen, how)[:, None, :] if rank.method == "asvd" else torch.ones((), dtype=torch.float64)
    last, first = _split(matrices * scales, r)
    return _balanced(last, first / scales)


def _split(matrices: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The truncated SVD as a projection: U_r (U_rᵀ M), or (M V_r) V_rᵀ where that side is shorter.

    Eigenvectors of the smaller of M Mᵀ and Mᵀ M take a quarter of an SVD's time, and at full rank both are exact.
    """
    if matrices.shape[1] <= matrices.shape[2]:
        axes = torch.linalg.eigh(matrices @ matrices.mT).eigenvectors.flip(-1)[..., :r]
        return axes, axes.mT @ matrices
    axes = torch.linalg.eigh(matrices.mT @ matrices).eigenvectors.flip(-1)[..., :r]
    return matrices @ axes, axes.mT


def _energies(matrices: Tensor) -> Tensor:
    """σ² of every group summed, descending."""
    short = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    values: Tensor = torch.linalg.eigvalsh(short @ short.mT)
    return values.flip(-1).clamp_min(0).sum(0)


def _output_axes(matrices: Tensor, gram: Tensor) -> Tensor:
    """Principal axes of the outputs W X, leading first. Shape [g, out, min(out, K)]."""
    axes: Tensor
    if matrices.shape[1] <= matrices.shape[2]:
        axes = torch.linalg.eigh(matrices @ gram @ matrices.mT).eigenvectors.flip(-1)
    else:
        axes = torch.linalg.svd(matrices @ _root(gram), full_matrices=False).U
    return axes


def _root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return root


def _balanced(last: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with equal norms of column i of the last and row i of the first factor."""
    a, b = last.norm(dim=-2), first.norm(dim=-1)
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
    return last * scale[..., None, :], first / scale[..., :, None]


def _gram(layer: Layer, seen: Seen | None) -> Tensor:
    """The Gram matrix of a layer's inputs, with a trace of the identity so that unseen directions have an order."""
    gram = None if seen is None else seen.gram
    if gram is None:
        msg = f"svd_llm must be given batches. Got no Gram matrix for {layer.parameter}. Pass batches=…."
        raise RejectedError(msg)
    gram = _finite(torch.as_tensor(gram, dtype=torch.float64), f"inputs of {layer.parameter}")
    gram = (gram + gram.mT) / 2
    most = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
    return gram + DAMPING * torch.where(most > 0, most, torch.ones_like(most)) * torch.eye(
        gram.shape[-1], dtype=torch.float64
    )


def _scales(layer: Layer, seen: Seen | None, how: Factoring) -> Tensor:
    if seen is None:
        msg = f"asvd must be given batches. Got no input statistics for {layer.parameter}. Pass batches=…."
        raise RejectedError(msg)
    means = _finite(torch.as_tensor(seen.absolute_means, dtype=torch.float64), f"inputs of {layer.parameter}")
    return means.pow(how.alpha) + ASVD_FLOOR


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        msg = f"{what} must be finite. Got NaN or infinity."
        raise RejectedError(msg)
    return tensor


# ------------------------------------------------------------------------------------------------------- convolutions


def _by_channel(layer: Layer, matrices: Tensor) -> Tensor:
    """Shape [groups, out / groups, in / groups, taps]."""
    return matrices.reshape(*matrices.shape[:2], layer.shape[1], layer.taps)


def _spread(layer: Layer, matrices: Tensor) -> Tensor:
    """A 2-D convolution as [groups, in · k_h, out · k_w]."""
    height, width = layer.shape[2:]
    weight = matrices.reshape(*matrices.shape[:2], layer.shape[1], height, width)
    return weight.permute(0, 2, 3, 1, 4).reshape(layer.groups, layer.shape[1] * height, -1)


def _spatial(layer: Layer, matrices: Tensor, r: int) -> tuple[Tensor, Tensor]:
    tall, wide = _balanced(*_split(_spread(layer, matrices), r))  # [g, in · k_h, r] and [g, r, out · k_w]
    last = wide.unflatten(2, (-1, layer.shape[3]))
    return tall.mT, last.transpose(1, 2)


def _leading(weight: Tensor, axis: int) -> Tensor:
    """All singular vectors of the unfolding along an axis, leading first. Shape [g, n, n]."""
    flat = weight.movedim(axis, 1).flatten(2)
    axes: Tensor = torch.linalg.eigh(flat @ flat.mT).eigenvectors.flip(-1)
    return axes


def _tucker(weight: Tensor, a: int, b: int, sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """1×1, core and 1×1 of [g, out, in, taps]: HOSVD, then HOOI, in which each axis sees the other one's projection."""
    ins, outs = _leading(weight, 2)[..., :a], _leading(weight, 1)[..., :b]
    for _ in range(sweeps):
        outs = _leading(torch.einsum("gosk,gsa->goak", weight, ins), 1)[..., :b]
        ins = _leading(torch.einsum("gosk,gob->gbsk", weight, outs), 2)[..., :a]
    core = torch.einsum("gosk,gob,gsa->gbak", weight, outs, ins)
    return ins.mT, core, outs
