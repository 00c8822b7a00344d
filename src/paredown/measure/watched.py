"""Watch what `evaluate` does with a predictor: which inputs it gives and whether the answers still depend on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from paredown.quantize.ranges import apart, range_of

Values = NDArray[np.float64]
NEARLY_CONSTANT = 0.01
"""Answers that spread less than this share of the dense network's over the samples no longer tell them apart."""


class Watch:
    """`predict` as before, and what passed through it: a digest of all inputs, their range, the spread of the answers.

    The spread is the largest difference, over the samples, of any one element of the answers; None where samples
    cannot be told apart (no batch axis, answers of several shapes). Nothing is kept of the data itself.
    """

    def __init__(self, predict: Callable[..., Any]) -> None:
        self._predict, self._digest = predict, hashlib.blake2b(digest_size=16)
        self._low: dict[int, Values] = {}
        self._high: dict[int, Values] = {}
        self._whole = True
        self.num_samples = 0
        self._lengths: list[int] = []
        self.low, self.high = float("inf"), float("-inf")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the predictor answers."""
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in given:
            self._digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            self._digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
        self.low, self.high = range_of(given, (self.low, self.high))
        answer = self._predict(*args, **kwargs)
        batch = given[0].shape[0] if given and given[0].dim() else 0
        self.num_samples += batch
        self._lengths.append(batch)
        for i, leaf in enumerate(t for t in pytree.tree_leaves(answer) if isinstance(t, Tensor)):
            self._whole = (
                self._whole and batch > 0 and leaf.dim() > 0 and leaf.shape[0] == batch and self._fits(i, leaf)
            )
            if self._whole:
                values = leaf.detach().cpu().double().numpy()
                self._low[i] = np.minimum(self._low.get(i, np.inf), values.min(0))
                self._high[i] = np.maximum(self._high.get(i, -np.inf), values.max(0))
        return answer

    def _fits(self, i: int, leaf: Tensor) -> bool:
        return i not in self._low or self._low[i].shape == tuple(leaf.shape[1:])

    @property
    def uneven(self) -> tuple[int, int, int] | None:
        """(calls, smallest, largest number of samples), where calls had different numbers of them; None where not."""
        ends = min(self._lengths, default=0), max(self._lengths, default=0)
        return None if ends[0] == ends[1] else (len(self._lengths), *ends)

    @property
    def digest(self) -> str:
        """Of all inputs so far, in their order."""
        return self._digest.hexdigest()

    @property
    def spread(self) -> float | None:
        """Largest difference between two samples in any element of the answers, in the answers' unit."""
        if not self._whole or self.num_samples < 2 or not self._low:
            return None
        return max(float((self._high[i] - self._low[i]).max(initial=0.0)) for i in self._low)


def oddities(dense: Watch, now: Watch) -> Iterator[str]:
    """What differs between the evaluation of the dense network and this one, in sentences.

    >>> import torch
    >>> still = Watch(lambda x: x * 0), Watch(lambda x: x)
    >>> _ = [watch(torch.tensor([[1.0], [2.0]])) for watch in still]
    >>> list(oddities(still[1], still[0]))
    ['the answers no longer depend on the sample: they spread by 0 over 2 samples, those of the dense network by 1']
    """
    if now.digest != dense.digest:
        yield (
            "evaluate gave other inputs than to the dense network, or in another order: fix the seed of its augmentation and "
            "do not shuffle; until then differences include that noise"
        )
    spread, before = now.spread, dense.spread
    if spread is not None and before and spread <= NEARLY_CONSTANT * before:
        yield (
            f"the answers no longer depend on the sample: they spread by {spread:.3g} over {now.num_samples} samples, those of "
            f"the dense network by {before:.3g}"
        )


def by_batches(num_values: int, watch: Watch) -> Iterator[str]:
    """A sentence where evaluate returned as many values as it asked for answers, with batches of different lengths: means of batches.

    >>> import torch
    >>> watch = Watch(lambda x: x)
    >>> _ = [watch(torch.zeros(n, 1)) for n in (32, 32, 4)]
    >>> list(by_batches(3, watch))
    ['evaluate returned 3 values, one for each batch of 4 to 32 samples: a small batch then weighs as much as a large one. Return one value per sample']
    >>> list(by_batches(68, watch))
    []
    """
    if watch.uneven is not None and num_values == watch.uneven[0]:
        calls, low, high = watch.uneven
        yield (
            f"evaluate returned {calls} values, one for each batch of {low} to {high} samples: a small batch then weighs as much as a "
            "large one. Return one value per sample"
        )


def another_range(calibration: tuple[float, float], watch: Watch) -> Iterator[str]:
    """A sentence where calibration inputs have another range than those of the evaluation, as 0…255 for 0…1."""
    said = apart(calibration, (watch.low, watch.high), "those that evaluate gives")
    if said:
        yield said


__all__ = ["NEARLY_CONSTANT", "Watch", "another_range", "by_batches", "oddities", "range_of"]
