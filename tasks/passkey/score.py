"""What counts as a right answer."""

from __future__ import annotations

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
