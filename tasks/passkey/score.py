"""What counts as a right answer, and how sure a share of right answers is."""

from __future__ import annotations

import math
import re


def first_integer(text: str) -> str:
    """The first run of decimal digits in a text, or ``""``; the Landmark code's reading of an answer.

    Example:
        >>> first_integer(" 12345. Remember 7")
        '12345'
    """
    found = re.search("[0-9]+", text)
    return found[0] if found else ""


def right_digits(answer: str, key: int) -> list[bool]:
    """For each digit of ``key``: whether the answer has the same digit at the same place.

    Example:
        >>> right_digits("12995", 12345)
        [True, True, False, False, True]
        >>> right_digits("1", 123)
        [True, False, False]
    """
    return [answer[i : i + 1] == digit for i, digit in enumerate(str(key))]


def wilson_interval(right: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share, honest at 0 and at 1 where the normal one has no width.

    Source: Wilson 1927, with z = 1.96: ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``.

    Args:
        right: successes, ``0..trials``.
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
