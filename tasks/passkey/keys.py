"""The numbers that are hidden, and which of them training never sees."""

from __future__ import annotations

import numpy as np

from infini.errors import InputError

HELD_OUT_ONE_IN = 10


def is_held_out(key):
    """Whether a key is kept for measurement; about one key in ten, by its value alone.

    Source: the finalizer of SplitMix64 (Steele et al. 2014), so neighbors in value are unrelated
    and the split needs no list, no seed and no file.

    Args:
        key: int, or integer array of any shape; not negative.

    Returns:
        bool, or bool array of the same shape.

    Example:
        >>> held = is_held_out(np.arange(10_000, 100_000))
        >>> bool(0.09 < held.mean() < 0.11)
        True
        >>> is_held_out(12_345) == bool(held[2_345])
        True
    """
    # At least one dimension: numpy wraps arrays silently at 2**64, but warns for single numbers.
    mixed = np.atleast_1d(np.asarray(key)).astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    held = (mixed ^ (mixed >> np.uint64(31))) % np.uint64(HELD_OUT_ONE_IN) == 0
    return bool(held[0]) if np.ndim(key) == 0 else held


def draw_keys(random: np.random.Generator, count: int, digits: int, held_out: bool) -> np.ndarray:
    """Keys of exactly ``digits`` digits (no leading zero), uniform over one side of the split.

    Args:
        random: source of randomness.
        count: how many; repeats are possible.
        digits: 3..18; with fewer there may be no held-out key at all, with more int64 overflows.
        held_out: True for measurement, False for training.

    Returns:
        int64 array ``[count]``.

    Raises:
        InputError: ``digits`` outside 3..18.

    Example:
        >>> keys = draw_keys(np.random.default_rng(0), 100, digits=5, held_out=True)
        >>> bool(is_held_out(keys).all()), bool((keys >= 10_000).all()), bool((keys <= 99_999).all())
        (True, True, True)
    """
    if not 3 <= digits <= 18:
        raise InputError(f"digits is {digits}; a key has 3 to 18 digits")
    keys = np.empty(count, np.int64)
    todo = np.ones(count, bool)
    while todo.any():
        keys[todo] = random.integers(10 ** (digits - 1), 10**digits, int(todo.sum()))
        todo = is_held_out(keys) != held_out
    return keys
