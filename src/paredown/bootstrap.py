"""Bootstrap: bounds of a mean over few seeds, the percentiles expanded for small n.

Hesterberg 2015, "What teachers should know about the bootstrap", section 4.4: α' = Φ(√(n/(n-1)) · t_{α, n-1}). Up to 6 seeds all
resamples are enumerated, so nothing is drawn; beyond, 4,000 with seed 0.
"""

from __future__ import annotations

import functools
import itertools
import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ENUMERATED, DRAWN = 6, 4_000
"""Seeds up to which every resample is looked at, and resamples that are drawn beyond."""


@functools.lru_cache(maxsize=1 << 16)  # a page asks for each point in every chart and table
def bound(values: tuple[float, ...], confidence: float) -> float:
    """One-sided upper bound of the mean of at least two values."""
    x = np.asarray(values, dtype=np.float64)
    picks, weights = resamples(len(x))
    # A mean over seeds can be off the seeds' own values by rounding: three times 0.1 is not 0.3.
    means = np.clip(picks @ x / len(x), x.min(), x.max())
    return quantile(means, weights, expanded(confidence, len(x)))


def quantile(values: Floats, weights: Floats, share: float) -> float:
    """The smallest value below or at which `share` of the weight lies."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    at = int(np.searchsorted(reached, share * (1 - 1e-12)))
    return float(values[order][min(at, len(values) - 1)])


@functools.cache
def resamples(n: int) -> tuple[Floats, Floats]:
    """(how often each of n seeds is in a resample [resamples, n], probability of each).

    >>> resamples(2)[0].tolist(), resamples(2)[1].tolist()
    ([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]], [0.25, 0.5, 0.25])
    """
    if n > ENUMERATED:
        drawn = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=DRAWN)
        return drawn.astype(np.float64), np.full(DRAWN, 1 / DRAWN)
    counts = [
        [combination.count(i) for i in range(n)] for combination in itertools.combinations_with_replacement(range(n), n)
    ]
    ways = [math.factorial(n) / math.prod(math.factorial(c) for c in row) for row in counts]
    return np.asarray(counts, dtype=np.float64), np.asarray(ways) / n**n


def expanded(confidence: float, n: int) -> float:
    """The percentile that is taken for a one-sided confidence with n seeds: Φ(√(n/(n-1)) · t).

    >>> round(expanded(0.95, 5), 4), round(expanded(0.95, 1000), 3)
    (0.9914, 0.95)
    """
    return NormalDist().cdf(math.sqrt(n / (n - 1)) * student_t(confidence, n - 1))


_MANY = 300
"""Degrees of freedom above which Student's quantile is expanded around the normal one."""


@functools.cache
def student_t(share: float, freedom: int) -> float:
    """Quantile of Student's t for a share ≥ ½, by bisection on its distribution function.

    >>> round(student_t(0.95, 2), 4), round(student_t(0.975, 9), 4)
    (2.92, 2.2622)
    """
    if freedom > _MANY:  # Abramowitz and Stegun, 26.7.5: right to eight digits here, and the series is long
        z = NormalDist().inv_cdf(share)
        terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
        return float(z + sum(term / freedom**power for power, term in enumerate(terms, start=1)))
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, freedom: int) -> float:
    """P(T ≤ t), t ≥ 0, by the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sin, cos = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term, total = (cos, cos) if odd else (1.0, 1.0)
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    area = 2 * angle / math.pi if freedom == 1 else 2 / math.pi * (angle + sin * total) if odd else sin * total
    return 0.5 + area / 2
