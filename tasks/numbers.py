"""Numbers sown into natural text, so that a memory has to tell a key from them."""

from __future__ import annotations

import numpy as np
from infini.tasks.passkey.keys import draw_keys

SHORTEST, LONGEST = 3, 9  # letters of a word that can become a number, as many digits
_STRETCH = 8192  # bytes; from one to the next the numbers are denser or rarer


def sow_numbers(text: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """A copy of a text in which some words are numbers of as many digits, none of them a held-out key.

    What books interfere with a key by are their own numbers (``"cut down to £17,500"``), a few in a row of training and
    hundreds in a million bytes. In every stretch of 8,192 bytes the share of words is another, uniform from 0 to ``2 * share``.

    Args:
        text: uint8 ``[bytes]``.
        share: 0..0.5, of the words of three to nine ASCII letters.
        seed: of the numbers and their places.

    Returns:
        uint8 ``[bytes]``.

    Example:
        >>> text = np.frombuffer(b"He had twelve apples and three pears. " * 300, np.uint8)
        >>> sown = sow_numbers(text, 0.1)
        >>> changed = text != sown
        >>> len(sown) == len(text), bool((sown[changed] >= 48).all() and (sown[changed] <= 57).all())
        (True, True)
    """
    random = np.random.default_rng(seed)
    lower = text | 32
    letter = np.concatenate([[False], (lower >= 97) & (lower <= 122) & (text >= 65), [False]])
    starts = np.flatnonzero(letter[1:] & ~letter[:-1])
    sizes = np.flatnonzero(letter[:-1] & ~letter[1:]) - starts
    density = random.uniform(0, 2 * share, len(text) // _STRETCH + 1)
    chosen = random.random(len(starts)) < density[starts // _STRETCH]
    sown = text.copy()
    for size in range(SHORTEST, LONGEST + 1):
        places = starts[chosen & (sizes == size)]
        numbers = draw_keys(random, len(places), size, held_out=False)
        powers = 10 ** np.arange(size - 1, -1, -1)
        sown[places[:, None] + np.arange(size)] = 48 + numbers[:, None] // powers % 10
    return sown
