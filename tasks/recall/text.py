"""The text of dense recall: ``Key of QX is 48213.`` said once, then asked for again and again."""

from __future__ import annotations

import numpy as np
from infini.tasks.passkey.keys import draw_keys
from infini.tasks.passkey.needles import FILLER
from infini.tasks.rows import run_of
from infini.tasks.text_files import read_texts

from infini.errors import InputError

DIGITS = 5
NAMES = np.array(
    [(first, second) for first in range(65, 91) for second in range(65, 91)], np.uint8
)  # AA..ZZ as bytes [676, 2]

_STATEMENT = np.frombuffer(b"\nKey of ?? is 00000.", np.uint8)
_NAME, KEY = 8, 14  # where the name and the digits stand in it
_POWERS = 10 ** np.arange(DIGITS - 1, -1, -1)
FILLER_BYTES = np.frombuffer(FILLER.encode(), np.uint8)


def haystack_bytes(haystack: str) -> np.ndarray:
    """The bytes of a haystack, uint8: ``"repeat"`` for the paper's sentences, or ``"text:FILES"``.

    Raises:
        InputError: another word, or files that :func:`infini.tasks.text_files.read_texts` cannot read.
    """
    if haystack == "repeat":
        return FILLER_BYTES
    if not haystack.startswith("text:"):
        raise InputError(f'haystack is {haystack!r}; use "repeat" or "text:FILE"')
    return np.frombuffer(read_texts(haystack.removeprefix("text:")).encode(), np.uint8)


def statements_of(names: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The statements that give each name its key.

    Args:
        names: uint8 ``[pairs, 2]``, two capital letters each.
        keys: int64 ``[pairs]``, of five digits.

    Returns:
        uint8 ``[pairs, 20]``; the digits begin at column ``KEY``.

    Example:
        >>> statements_of(NAMES[:1], np.array([48213])).tobytes()
        b'\\nKey of AA is 48213.'
    """
    statements = np.tile(_STATEMENT, (len(keys), 1))
    statements[:, _NAME : _NAME + 2] = names
    statements[:, KEY : KEY + DIGITS] = 48 + keys[:, None] // _POWERS % 10
    return statements


def write_recall(
    random: np.random.Generator,
    tokens: np.ndarray,
    answer: np.ndarray,
    pool: int,
    longest_gap: int,
    held_out: bool = False,
    filler: np.ndarray = FILLER_BYTES,
) -> np.ndarray:
    """Fills a row with statements about ``pool`` names, filler of random length between them.

    A name's first mention states its key; at every later mention the digits follow from the text
    before and are the answer. The distance to the mention before is about
    ``pool * (20 + longest_gap / 2)`` bytes.

    Source: associative recall as a teacher of retrieval (as in ARMT, arXiv 2407.04841), on this
    project's wording.

    Args:
        random: source of randomness.
        tokens: uint8 ``[length]``; overwritten.
        answer: bool ``[length]``, all False; set to True at the digits that are answers.
        pool: number of names, 1..676.
        longest_gap: filler between two statements is uniform in ``0..longest_gap`` bytes.
        held_out: draw the keys that training never sees.
        filler: uint8 ``[period]``; begun at a random byte.

    Returns:
        int64 ``[length]``: at an answer, how many bytes before the same digit was last said; else 0.

    Example:
        >>> tokens, answer = np.empty(44, np.uint8), np.zeros(44, bool)
        >>> distance = write_recall(np.random.default_rng(0), tokens, answer, 1, 0)
        >>> tokens[:20].tobytes() == tokens[20:40].tobytes(), answer.nonzero()[0].tolist()
        (True, [34, 35, 36, 37, 38])
        >>> set(distance[answer].tolist())
        {20}
    """
    length, size = len(tokens), len(_STATEMENT)
    gaps = random.integers(0, longest_gap, length // size + 1, endpoint=True)
    starts = np.cumsum(gaps) + size * np.arange(len(gaps))
    starts = starts[starts < length]

    who = random.integers(0, pool, len(starts))
    names = NAMES[random.permutation(len(NAMES))[:pool]]
    keys = draw_keys(random, pool, DIGITS, held_out)
    statements = statements_of(names, keys)

    # Grouped by name with time kept, so that each mention's neighbor is the mention before it.
    order = np.argsort(who, kind="stable")
    back = np.zeros(len(starts), np.int64)
    back[order[1:]] = np.where(np.diff(who[order]) == 0, np.diff(starts[order]), 0)

    text = run_of(filler, int(random.integers(len(filler))), length + size).copy()
    where = starts[:, None] + np.arange(size)
    text[where] = statements[who]
    distance = np.zeros(length + size, np.int64)
    distance[where[:, KEY : KEY + DIGITS]] = back[:, None]

    tokens[:] = text[:length]
    answer[:] = distance[:length] > 0
    return distance[:length]
