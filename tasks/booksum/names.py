"""Who and what a book names: people and places, found by rules that can be read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

LEAST = 3  # times that a name must stand inside sentences
WORD = re.compile(r"[A-Za-zÀ-ÿ]+(?:[-’'](?=[A-ZÀ-Þ])[A-Za-zÀ-ÿ]+|-[a-zß-ÿ]+)*")
_HIS, _HER = re.compile(r"\b(?:he|his|him|himself)\b"), re.compile(r"\b(?:she|her|hers|herself)\b")
_MEN = re.compile(r"\b(?:Mr\.?|Sir|Lord|Uncle|Captain|Dr\.?|Monsieur|Don) $")
_WOMEN = re.compile(r"\b(?:Mrs\.?|Miss|Lady|Aunt|Madame|Mademoiselle) $")
_SAYS = r"(?:said|says|cried|asked|replied|answered|thought|whispered|looked|smiled|laughed|exclaimed|nodded|turned|knew|felt|told)"
_BEFORE_PERSON = re.compile(rf"\b{_SAYS} $")
_AFTER_PERSON = re.compile(rf" {_SAYS}\b")
_BEFORE_PLACE = re.compile(r"\b(?:in|at|near|into|from|towards?|through|round|reached|left|visit(?:ed)?) $")
# Written large in English without being anybody's name.
_COMMON = (
    "I O Oh Ah Mr Mrs Miss Dr Sir Madam Lord Lady King Queen Prince Princess Captain Colonel Major General Doctor Professor Uncle Aunt God "
    "Heaven Christ Lord Providence Christian Bible English French German Spanish Italian American Indian Greek Latin Roman Dutch Irish Scotch "
    "Russian European Hebrew Jew Jews Jewish Turk Turkish Swiss Welsh Scottish Catholic Protestant Christians Romans Greeks Indians "
    "Englishman Frenchman Englishmen Frenchmen Chapter Book Part Volume Monday Tuesday Wednesday Thursday Friday Saturday Sunday January "
    "February March April May June July August September October November December Christmas Easter Monsieur Madame Mademoiselle Don Saint St "
    "Yes No North South East West II III IV VI VII VIII IX XI XII"
)
COMMON = frozenset(_COMMON.split())


class Mention(NamedTuple):
    """One place where a name stands: ``text[start:stop]``."""

    name: str
    start: int
    stop: int


def find_mentions(text: str) -> list[Mention]:
    """Every mention of a name: words in a row that this text writes large inside its sentences and, but for one time in twenty, never small.

    A word is inside a sentence where a small letter or a comma and one blank stand before it.

    Example:
        >>> text = "We saw Long Silver there. Then Silver went. Old Silver, and Silver again, near Silver and my Long friend, Long. " * 3
        >>> sorted({mention.name for mention in find_mentions(text)})
        ['Long', 'Long Silver', 'Silver']
    """
    inside, small, words = Counter(), Counter(), []
    for match in WORD.finditer(text):
        word, start = match[0], match.start()
        if word[0].isupper():
            words.append(match)
            inside[word] += start > 1 and text[start - 1] == " " and (text[start - 2].islower() or text[start - 2] == ",")
        else:
            small[word] += 1
    names = {
        word for word, count in inside.items()
        if count >= LEAST and 20 * small[word.lower()] <= count and word not in COMMON and len(word) > 1 and not word.isupper()
    }
    return list(_runs(text, [match for match in words if match[0] in names]))


def _runs(text: str, words: list[re.Match]) -> Iterator[Mention]:
    """Words with one blank between them are one name."""
    i = 0
    while i < len(words):
        start, stop = words[i].span()
        while i + 1 < len(words) and words[i + 1].start() == stop + 1 and text[stop] == " ":
            i += 1
            stop = words[i].end()
        yield Mention(text[start:stop], start, stop)
        i += 1


def kinds_of(text: str, mentions: list[Mention]) -> dict[str, str]:
    """What a name names: ``he``, ``she``, ``person`` (no telling which) or ``place``; names that nothing tells are left out.

    A person is one who says or does something right beside the name, or has a title, twice or more; he or she by the title or by
    the pronouns in the 60 letters behind, at least three to two. A place stands behind in, at, near, into, from, through ... one time
    in three, and never does what people do.
    """
    people, places, his, her, count = Counter(), Counter(), Counter(), Counter(), Counter()
    for name, start, stop in mentions:
        before, after = text[max(0, start - 16) : start], text[stop : stop + 60].partition("\n")[0]
        count[name] += 1
        titled = bool(_MEN.search(before)) - bool(_WOMEN.search(before))
        people[name] += bool(titled) or bool(_BEFORE_PERSON.search(before) or _AFTER_PERSON.match(after))
        places[name] += bool(_BEFORE_PLACE.search(before))
        his[name] += len(_HIS.findall(after)) + 3 * (titled > 0)
        her[name] += len(_HER.findall(after)) + 3 * (titled < 0)
    found = {}
    for name, times in count.items():
        if people[name] >= 2:
            found[name] = _person(his[name], her[name])
        elif not people[name] and times >= LEAST and 3 * places[name] >= times:
            found[name] = "place"
    return found


def _person(his: int, her: int) -> str:
    return "she" if 2 * her >= max(4, 3 * his) else "he" if 2 * his >= max(4, 3 * her) else "person"


def names_in(summary: str, book: str) -> set[str]:
    """The people and places of a book that a text names, each by a word of its name that the book's names have.

    Example:
        >>> book = "“Stop,” said Silver to me. We met Silver in Bristol, and Silver said so in Bristol; he went from Bristol. " * 3
        >>> sorted(names_in("A boy meets Long John Silver at sea.", book))
        ['Silver']
    """
    return _known(book) & set(WORD.findall(summary))


@lru_cache(maxsize=32)  # a book is asked about many times
def _known(book: str) -> frozenset[str]:
    return frozenset(word for name in kinds_of(book, find_mentions(book)) for word in name.split())
