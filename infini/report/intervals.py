"""How sure a number is: 95 % intervals of shares, of means over few seeds, and of differences paired by document."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
_T += [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]
_T += [2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def wilson_interval(right: float, trials: int) -> tuple[float, float]:
    """95 % interval of a share, honest at 0 and at 1 where the normal one has no width.

    Source: Wilson 1927, with z = 1.96: ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``.

    Args:
        right: successes, ``0..trials``; a sum of shares, one of each trial, gives an interval that is too wide rather than too narrow.
        trials: at least 1.

    Returns:
        Lower and upper bound, both in 0..1.

    Example:
        >>> low, high = wilson_interval(20, 20)
        >>> round(low, 3), high
        (0.839, 1.0)
    """
    z2, share = 1.96**2, right / trials
    center = share + z2 / (2 * trials)
    half = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2)))
    scale = 1 + z2 / trials
    # The ends are exact where all or none are right; rounding would miss them by a hair.
    low = 0.0 if right == 0 else (center - half) / scale
    high = 1.0 if right == trials else (center + half) / scale
    return low, high


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of a number over seeds, and half its 95 % interval: ``t s / sqrt(n)``, Student's t; None of a single seed.

    Example:
        >>> mean, half = mean_interval([1.0, 2.0, 3.0])  # s = 1, t = 4.303
        >>> mean, round(half, 4)
        (2.0, 2.4843)
        >>> mean_interval([5.0])
        (5.0, None)
    """
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, (_T[count - 2] if count - 2 < len(_T) else 1.96) * deviation / math.sqrt(count)


def paired_difference(
    first: Sequence[float], second: Sequence[float], sizes: Sequence[float], draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The difference of two totals per unit, and its 95 % interval by resampling documents.

    ``sum(first - second) / sum(sizes)``; a draw takes as many documents as there are, with replacement, each with both its numbers:
    that some documents are hard for both makes the interval no wider.

    Args:
        first: of each document.
        second: of the same documents.
        sizes: units of each document, such as bytes.
        draws: of the percentile bootstrap.
        seed: of the draws.

    Returns:
        Difference, lower and upper bound.

    Example:
        >>> difference, low, high = paired_difference([2.0, 40.0, 6.5], [1.0, 38.0, 5.0], [1, 2, 1])
        >>> difference, 1.0 <= low < difference < high <= 1.5
        (1.125, True)
    """
    differences, sizes = np.subtract(first, second, dtype=float), np.asarray(sizes, float)
    random, count = np.random.default_rng(seed), len(sizes)
    times = random.multinomial(count, np.full(count, 1 / count), size=draws)
    low, high = np.percentile((times @ differences) / (times @ sizes), [2.5, 97.5])
    return float(differences.sum() / sizes.sum()), float(low), float(high)
