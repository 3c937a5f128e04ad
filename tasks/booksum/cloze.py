"""Questions about a book, made from its own sentences: which name stood in the blank?

Two questions make a pair. Both offer the same two names, and each name is the answer of one of them. So whoever does not know the
passages, and prefers one name to the other for whatever reason (it is frequent, short, or was met last), is right exactly once in two.
What a sentence gives away by itself is measured by asking the same model with its memory silenced.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from infini.tasks.booksum.names import WORD, find_mentions, kinds_of
from infini.tasks.booksum.prompt import BLANK

CHOICES = 2
LETTERS, WORDS = (40, 300), 8  # of a passage: from, to; at least
_NEAREST = 9  # distances below 2^10 letters are one bin
_BREAK = re.compile(r"(?<=[.!?])[”’\")]*\s+(?=[“‘\"(]?[A-ZÀ-Þ])|\n+")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Mme|M|Messrs|[A-Z])\.$")
# The word before a name, and what tells that more of the name stands before or behind the blank.
_TITLE = re.compile(r"\b(Mr|Mrs|Miss|Dr|Sir|Lord|Lady|Captain|Colonel|Major|Uncle|Aunt|Madame|Monsieur|Mademoiselle|Don|Saint|St)\.? $")
_MORE_BEFORE = re.compile(r"(?:[a-z,;:—’”] [A-ZÀ-Þ][\w’]*\.?|\b(?:[Tt]he|[Aa]n?|[Tt]his|[Tt]hat|my|your|[A-ZÀ-Þ]\.)) $")
_MORE_BEHIND = re.compile(r"[ -][A-ZÀ-Þ]|-")
_FIRST_WORDS = re.compile(r"\S+(?: \S+){5}(?=(?: \S+){6})")
_WHO = re.compile(r" (?:\w+ed|was|had|said|went|came|took|gave|made|saw|knew|told|felt|stood|sat|ran|put|did|could|would)\b")


@dataclass(frozen=True)
class Question:
    """A sentence of a book with a name taken out.

    Attributes:
        passage: the sentence, ``____`` in place of the name.
        answer: the name.
        choices: two names of one kind from the same book, sorted; the answer is one of them.
        kind: ``who`` (the name does something), ``name`` (of a person elsewhere in the sentence) or ``place``.
        distance: letters of the book behind the passage.
        pair: number of the pair.
    """

    passage: str
    answer: str
    choices: tuple[str, ...]
    kind: str
    distance: int
    pair: int

    @property
    def bin(self) -> int:
        """Questions of a pair have the same: distances from ``2^bin`` letters on; 9 takes what is nearer too."""
        return _bin(self.distance)


@dataclass(frozen=True)
class Passage:
    """A sentence that names somebody or something that may be asked for.

    Attributes:
        sentence: as it stands in the book.
        start: where the name begins in it.
        name: the name.
        title: before the name; "" where there is none.
        distance: letters of the book behind the sentence.
    """

    sentence: str
    start: int
    name: str
    title: str
    distance: int

    @property
    def opening(self) -> str:
        """The sentence up to the name."""
        return self.sentence[: self.start]

    @property
    def blanked(self) -> str:
        """The sentence with ``____`` in place of the name."""
        return self.opening + BLANK + self.sentence[self.start + len(self.name) :]

    @cached_property
    def words(self) -> frozenset[str]:
        """All words of the sentence."""
        return frozenset(WORD.findall(self.sentence))

    def question(self, choices: tuple[str, ...], place: bool, pair: int) -> Question:
        """What asks for its name, between ``choices``."""
        kind = "place" if place else "who" if _WHO.match(self.sentence[self.start + len(self.name) :]) else "name"
        return Question(self.blanked, self.name, choices, kind, self.distance, pair)


def make_questions(text: str, seed: int = 0, most: int | None = None) -> list[Question]:
    """Questions about a text, in whole pairs.

    A passage is a sentence of 40 to 300 letters and at least 8 words that stands once in the text and ends with a full stop, a
    question mark or an exclamation mark. Its name is one of a person or a place (:mod:`infini.tasks.booksum.names`) whose words stand in it
    once, without more of the name before or behind. The two names of a pair are of one kind (he, she, a person, a place) and have the
    same title before them (Mr, Lady, none), so that grammar does not tell them apart, and both or neither a blank, so that they are
    the same tokens in both questions; they have no word in common, and neither stands in the other's passage. The two passages are
    equally far from the text's end, within a factor of two.

    Args:
        text: the book, or the part of it that is read.
        seed: of the order in which passages are taken.
        most: at most so many, as evenly over the distances as pairs allow; None: all.

    Example:
        >>> people = ["Ahab", "Starbuck"]
        >>> scene = "On day {0} the old sailor {1} climbed the mast before it rained, and {1} said so. By noon of day {0} nobody had seen {1} there."
        >>> questions = make_questions(" ".join(scene.format(i, people[i % 2]) for i in range(40)))
        >>> sorted(question.answer for question in questions if question.pair == 0) == people
        True
    """
    random, pairs = np.random.default_rng(seed), []
    pools: dict[tuple[int, str, str, bool], dict[str, list[Passage]]] = defaultdict(lambda: defaultdict(list))
    for passage, kind in find_passages(text):
        pools[_bin(passage.distance), kind, passage.title, passage.opening[-1:] in ("", " ")][passage.name].append(passage)
    for (_, kind, _, _), pool in sorted(pools.items()):
        for name in sorted(pool):
            pool[name] = [pool[name][i] for i in random.permutation(len(pool[name]))]
        pairs += [(kind, passages) for passages in _pairs(pool)]
    if most is not None:
        pairs = _evenly(pairs, most // CHOICES, random)
    return [
        passage.question(tuple(sorted(other.name for other in passages)), kind == "place", pair)
        for pair, (kind, passages) in enumerate(pairs)
        for passage in passages
    ]


def _bin(distance: int) -> int:
    return max(_NEAREST, distance.bit_length() - 1)


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Where sentences begin and end: at a full stop, question mark or exclamation mark before a capital letter, and at line ends.

    >>> [("“No!” said Mr. Dee. He went."[a:b]) for a, b in sentences("“No!” said Mr. Dee. He went.")]
    ['“No!” said Mr. Dee.', 'He went.']
    """
    start = 0
    for match in _BREAK.finditer(text):
        if "\n" not in match[0] and _ABBREVIATION.search(text, max(start, match.start() - 8), match.start()):
            continue
        stop = match.start() + len(match[0]) - len(match[0].lstrip("”’\")"))
        yield start, stop
        start = match.end()
    yield start, len(text)


def find_passages(text: str) -> Iterator[tuple[Passage, str]]:
    """All that may be asked about a text, in its order, each with the kind of its name, see :func:`make_questions`.

    A sentence with several names comes once for each of them.
    """
    mentions = find_mentions(text)
    kinds, starts = kinds_of(text, mentions), [mention.start for mention in mentions]
    spans = [(start, stop) for start, stop in sentences(text) if LETTERS[0] <= stop - start <= LETTERS[1]]
    times = Counter(text[start:stop] for start, stop in spans)
    for start, stop in spans:
        sentence = text[start:stop]
        words = Counter(WORD.findall(sentence))
        if times[sentence] > 1 or BLANK[0] in sentence or words.total() < WORDS or sentence.rstrip("”’\")")[-1:] not in (".", "!", "?"):
            continue
        for mention in mentions[bisect_left(starts, start) : bisect_left(starts, stop)]:
            before, behind = sentence[: mention.start - start], sentence[mention.stop - start :]
            title = _TITLE.search(before)
            whole = (title or not _MORE_BEFORE.search(before)) and not _MORE_BEHIND.match(behind)
            if whole and mention.name in kinds and all(words[word] == 1 for word in mention.name.split()):
                title = title[1] if title else ""
                yield Passage(sentence, len(before), mention.name, title, len(text) - stop), kinds[mention.name]


def find_recitals(text: str) -> Iterator[Passage]:
    """All sentences of a text that may be recited from their first words, in its order: each once in it, and of twelve words or more.

    What is left to recite is the name of the passage.

    >>> [one.name for one in find_recitals("It rained. On that day the wind had turned and the road was empty again. We slept.")]
    [' turned and the road was empty again.']
    """
    spans = [(start, stop) for start, stop in sentences(text) if LETTERS[0] <= stop - start <= LETTERS[1]]
    times = Counter(text[start:stop] for start, stop in spans)
    for start, stop in spans:
        sentence = text[start:stop]
        begun = _FIRST_WORDS.match(sentence)
        if times[sentence] == 1 and begun and BLANK[0] not in sentence:
            yield Passage(sentence, begun.end(), sentence[begun.end() :], "", len(text) - stop)


def _pairs(pool: dict[str, list[Passage]]) -> Iterator[list[Passage]]:
    """Passages of two names, as long as there are; the names with the most go first."""
    while True:
        chosen: list[Passage] = []
        for name in sorted(pool, key=lambda name: (-len(pool[name]), name)):
            for passage in pool[name]:
                if all(_apart(passage, other) for other in chosen):
                    chosen.append(passage)
                    break
            if len(chosen) == CHOICES:
                break
        if len(chosen) < CHOICES:
            return
        for passage in chosen:
            pool[passage.name].remove(passage)
        yield chosen


def _apart(one: Passage, other: Passage) -> bool:
    """Neither names the other's answer, nor a part of it."""
    return not (one.words & set(other.name.split()) or other.words & set(one.name.split()))


def _evenly(pairs: Sequence[tuple[str, list[Passage]]], most: int, random: np.random.Generator) -> list[tuple[str, list[Passage]]]:
    """At most so many pairs: one of each bin in turn."""
    bins: dict[int, list] = defaultdict(list)
    for i in random.permutation(len(pairs)):
        bins[_bin(pairs[i][1][0].distance)].append(pairs[i])
    taken = [pair for turn in range(max(map(len, bins.values()), default=0)) for own in bins.values() for pair in own[turn : turn + 1]]
    return taken[:most]
