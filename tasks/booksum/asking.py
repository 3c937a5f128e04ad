"""Which questions about a book stand where in it: distances of every size, near ones first in training."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from infini.tasks.booksum.cloze import Passage, find_passages, find_recitals
from infini.tasks.booksum.prompt import ask_blank, ask_recital

from infini.data.tokenizer import Tokenizer

Parts = list[tuple[np.ndarray, bool]]  # token ids, and whether they are an answer
NEAREST = 16  # tokens between a passage and its question, at least
STRETCH = (64, 2048)  # tokens of a book that are read before questions on the way are asked again
_DRAWS = 8  # distances that are tried
_PIECE = 64  # tokens that are taken to be equally long


@dataclass(frozen=True)
class Passages:
    """Sentences of a book that may be asked for, in its order.

    Attributes:
        found: each with what is asked of it.
        begins, ends: the token that the sentence of each begins in, and the one behind it; give or take a few.
    """

    found: Sequence[Passage]
    begins: np.ndarray
    ends: np.ndarray

    def between(self, start: int, stop: int) -> Passages:
        """Those that lie in the tokens ``start`` to ``stop - 1`` of the book, counted from there."""
        first, last = bisect_left(self.begins, start), bisect_left(self.ends, stop)
        return Passages(self.found[first:last], self.begins[first:last] - start, self.ends[first:last] - start)


def passages_of(book: np.ndarray, tokenizer: Tokenizer) -> tuple[Passages, Passages]:
    """What may be asked of a book, from its token ids: names in sentences, and sentences to recite."""
    text = tokenizer.decode(book.tolist())
    borders = np.append(np.arange(0, len(book), _PIECE), len(book))
    letters = np.cumsum([0] + [len(tokenizer.decode(book[a:b].tolist())) for a, b in zip(borders, borders[1:], strict=False)])
    # A letter that a border cuts is counted twice: too few to matter, but for their sum.
    letters = letters * (len(text) / max(1, letters[-1]))

    def placed(found: Iterator[Passage]) -> Passages:
        kept = list(found)
        stops = np.array([len(text) - passage.distance for passage in kept], np.float64)
        starts = stops - [len(passage.sentence) for passage in kept]
        return Passages(kept, *(np.interp(part, letters, borders).round().astype(np.int64) for part in (starts, stops)))

    return placed(passage for passage, _ in find_passages(text)), placed(find_recitals(text))


class Course(NamedTuple):
    """How a part of a book is asked about.

    Attributes:
        share: 0 to below 1, of what is read on the way: questions.
        recital_share: 0..1, of the questions that ask to recite.
        farthest: most tokens between a passage and its question.
        room: tokens that questions behind the part may take.
    """

    share: float
    recital_share: float
    farthest: int
    room: int


def on_the_way(count: int, share: float) -> int:
    """Tokens of questions on the way through so many of a book."""
    return int(count * share / (1 - share))


def ask_on_the_way(book: np.ndarray, passages: Sequence[Passages], course: Course, tokenizer: Tokenizer, random: np.random.Generator) -> Parts:
    """A book with questions after every some hundred tokens and behind it, as many as fit.

    Args:
        book: token ids.
        passages: of this book, names and recitals, see :func:`passages_of`.
        course: see :class:`Course`.
        tokenizer: the model's.
        random: source of randomness.

    Returns:
        Token ids, part after part, each with whether it is an answer; nothing where there is no question to ask.
    """
    line_ends = np.flatnonzero(book == tokenizer.encode_bytes(b"\n")[-1]) + 1
    asked: set[str] = set()
    names, recitals = (Asker(random, own, course.farthest, asked) for own in passages)
    parts, place, room = [], 0, 0
    while place < len(book):
        stop = len(book)
        if course.share:
            stop = min(stop, place + int(STRETCH[0] * (STRETCH[1] / STRETCH[0]) ** random.random()))
            following = line_ends[np.searchsorted(line_ends, stop) :][:1]  # no sentence is interrupted where lines are not endless
            stop = int(following[0]) if len(following) and following[0] < stop + STRETCH[1] else stop
        parts.append((book[place:stop], False))
        room += on_the_way(stop - place, course.share) + (course.room if stop == len(book) else 0)
        least = 0 if stop == len(book) else -course.room  # on the way the last one may take the room of the next
        while room > 0:
            recites = random.random() < course.recital_share
            passage = (recitals if recites else names).draw(stop)
            if passage is None and 0 < course.recital_share < 1:
                recites = not recites
                passage = (recitals if recites else names).draw(stop)
            if passage is None:
                break
            ask = ask_recital(tokenizer, passage.opening, passage.name) if recites else ask_blank(tokenizer, passage.blanked, passage.name)
            room -= sum(map(len, ask))
            if room < least:
                break
            parts += zip(ask, (False, True), strict=True)
        place = stop
    return parts if any(said for _, said in parts) else []


class Asker:
    """Draws what is asked at each place of a book; no sentence twice.

    Args:
        random: source of randomness.
        passages: of one kind, of what is read.
        asked: sentences that were asked for; those drawn here are added.
        farthest: most tokens between a passage and its question.

    Example:
        >>> found = [Passage(f"Ann had {i} cats.", 0, "Ann", "", 0) for i in range(100)]
        >>> asker = Asker(np.random.default_rng(0), Passages(found, np.arange(0, 6400, 64), np.arange(50, 6450, 64)), farthest=500, asked=set())
        >>> numbers = [found.index(asker.draw(3200)) for _ in range(4)]
        >>> all(42 <= number <= 48 for number in numbers), len(set(numbers))
        (True, 4)
    """

    def __init__(self, random: np.random.Generator, passages: Passages, farthest: int, asked: set[str]):
        self.passages = passages
        self._random, self._farthest, self._asked = random, farthest, asked

    def draw(self, place: int) -> Passage | None:
        """A passage to ask for when ``place`` tokens are read, its distance log-uniform; None where hardly any is left."""
        most = min(place, self._farthest)
        for _ in range(_DRAWS if most > NEAREST else 0):
            distance = NEAREST * (most / NEAREST) ** self._random.random()
            for i in _outwards(bisect_left(self.passages.ends, place - distance), len(self.passages.found)):
                away = place - int(self.passages.ends[i])
                if not distance / 2 <= away <= 2 * distance:
                    break
                sentence = self.passages.found[i].sentence
                if NEAREST <= away <= self._farthest and sentence not in self._asked:
                    self._asked.add(sentence)
                    return self.passages.found[i]
        return None


def _outwards(middle: int, count: int) -> Iterator[int]:
    """Indices below ``count``, from ``middle`` to both sides.

    >>> list(_outwards(2, 5))
    [2, 1, 3, 0, 4]
    """
    for step in range(count + 1):
        for i in (middle + step, middle - step - 1):
            if 0 <= i < count:
                yield i
