"""The text of dense recall: ``Key of QX is 48213.`` said once, then asked for again and again."""

from __future__ import annotations

from collections import Counter

import numpy as np
from infini.tasks.passkey.keys import draw_keys
from infini.tasks.passkey.needles import FILLER
from infini.tasks.rows import run_of
from infini.tasks.text_files import read_texts

from infini.data.tokenizer import ByteTokenizer, Tokenizer
from infini.errors import InputError

DIGITS = 5
NAMES = [chr(first) + chr(second) for first in range(65, 91) for second in range(65, 91)]
_POWERS = 10 ** np.arange(DIGITS - 1, -1, -1)
FILLER_BYTES = np.frombuffer(FILLER.encode(), np.uint8)


def haystack_ids(haystack: str, tokenizer: Tokenizer) -> np.ndarray:
    """The token ids of a haystack: ``"repeat"`` for the paper's sentences, or ``"text:FILES"``.

    Raises:
        InputError: another word, or files that :func:`infini.tasks.text_files.read_texts` cannot read.
    """
    if haystack != "repeat" and not haystack.startswith("text:"):
        raise InputError(f'haystack is {haystack!r}; use "repeat" or "text:FILE"')
    text = FILLER if haystack == "repeat" else read_texts(haystack.removeprefix("text:"))
    return tokenizer.encode_bytes(text.encode())


class Statements:
    """The statement that gives a name its key, for every name, in the tokens of a tokenizer, all of one size.

    Of a trained tokenizer names are left out whose statement has more or fewer tokens than those of most.

    Args:
        tokenizer: of the rows; each digit is a token of its own.

    Attributes:
        size: tokens of a statement.
        key: where its digits begin.
        names: how many there are.

    Raises:
        InputError: a digit is no token of its own.

    Example:
        >>> statements = Statements(ByteTokenizer())
        >>> statements.of(np.array([0]), np.array([48213])).tobytes()
        b'\\nKey of AA is 48213.'
    """

    def __init__(self, tokenizer: Tokenizer):
        written = [tokenizer.encode_bytes(f"\nKey of {name} is {'0' * DIGITS}.".encode()) for name in NAMES]
        self.size = Counter(map(len, written)).most_common(1)[0][0]
        self._all = np.stack([ids for ids in written if len(ids) == self.size])
        self._digits = np.concatenate([tokenizer.encode_bytes(b"%d" % digit) for digit in range(10)])
        self.key, self.names = self.size - 1 - DIGITS, len(self._all)
        if len(self._digits) != 10 or (self._all[:, self.key : -1] != self._digits[0]).any():
            raise InputError("the tokenizer joins digits, but each is to be recalled by itself: make one with infini tokenizer")

    def of(self, names: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The statements of some names, by number, with these keys of five digits: ids ``[pairs, size]``."""
        statements = self._all[names]
        statements[:, self.key : self.key + DIGITS] = self._digits[keys[:, None] // _POWERS % 10]
        return statements


_BYTES = Statements(ByteTokenizer())


def write_recall(
    random: np.random.Generator,
    tokens: np.ndarray,
    answer: np.ndarray,
    pool: int,
    longest_gap: int,
    held_out: bool = False,
    filler: np.ndarray = FILLER_BYTES,
    statements: Statements = _BYTES,
) -> np.ndarray:
    """Fills a row with statements about ``pool`` names, filler of random length between them.

    A name's first mention states its key; at every later mention the digits follow from the text
    before and are the answer. The distance to the mention before is about
    ``pool * (size + longest_gap / 2)`` tokens; a statement has 20 bytes, or some 14 tokens of a trained tokenizer.

    Source: associative recall as a teacher of retrieval (as in ARMT, arXiv 2407.04841), on this
    project's wording.

    Args:
        random: source of randomness.
        tokens: ids ``[length]``; overwritten.
        answer: bool ``[length]``, all False; set to True at the digits that are answers.
        pool: number of names, at least 1, at most those of ``statements``.
        longest_gap: filler between two statements is uniform in ``0..longest_gap`` tokens.
        held_out: draw the keys that training never sees.
        filler: ids ``[period]``; begun at a random token.
        statements: in the tokens of the same tokenizer.

    Returns:
        int64 ``[length]``: at an answer, how many tokens before the same digit was last said; else 0.

    Example:
        >>> tokens, answer = np.empty(44, np.uint8), np.zeros(44, bool)
        >>> distance = write_recall(np.random.default_rng(0), tokens, answer, 1, 0)
        >>> tokens[:20].tobytes() == tokens[20:40].tobytes(), answer.nonzero()[0].tolist()
        (True, [34, 35, 36, 37, 38])
        >>> set(distance[answer].tolist())
        {20}
    """
    length, size = len(tokens), statements.size
    gaps = random.integers(0, longest_gap, length // size + 1, endpoint=True)
    starts = np.cumsum(gaps) + size * np.arange(len(gaps))
    starts = starts[starts < length]

    who = random.integers(0, pool, len(starts))
    names = random.permutation(statements.names)[:pool]
    said = statements.of(names, draw_keys(random, pool, DIGITS, held_out))

    # Grouped by name with time kept, so that each mention's neighbor is the mention before it.
    order = np.argsort(who, kind="stable")
    back = np.zeros(len(starts), np.int64)
    back[order[1:]] = np.where(np.diff(who[order]) == 0, np.diff(starts[order]), 0)

    text = run_of(filler, int(random.integers(len(filler))), length + size).copy()
    where = starts[:, None] + np.arange(size)
    text[where] = said[who]
    distance = np.zeros(length + size, np.int64)
    distance[where[:, statements.key : statements.key + DIGITS]] = back[:, None]

    tokens[:] = text[:length]
    answer[:] = distance[:length] > 0
    return distance[:length]
