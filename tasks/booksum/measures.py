"""What a written summary says of the book, without any model."""

from __future__ import annotations

import re
from functools import lru_cache

from infini.tasks.booksum.cloze import sentences
from infini.tasks.booksum.names import WORD, names_in
from infini.tasks.booksum.rouge import rouge

COPIED = 5  # words in a row


def score_summary(written: str, reference: str, book: str) -> dict[str, float | int | None]:
    """All scores of a summary.

    Args:
        written: by a model.
        reference: by a person.
        book: the whole text.

    Returns:
        words; rouge1, rouge2, rougeL, geometric_mean of :func:`infini.tasks.booksum.rouge.rouge`; matched (geometric mean of the first
        words only, as many as the reference has, so that length pays nobody); entity_recall; copy_rate.
    """
    matched = rouge(first_words(written, len(reference.split())), reference)["geometric_mean"]
    return {
        "words": len(written.split()),
        **rouge(written, reference),
        "matched": matched,
        "entity_recall": entity_recall(written, reference, book),
        "copy_rate": copy_rate(written, book),
    }


def entity_recall(written: str, reference: str, book: str) -> float | None:
    """Share of the people and places of the book named in the reference that the written summary names too; None where it names none.

    Example:
        >>> book = "“Stop,” said Silver to me. We met Silver in Bristol, and Silver said so in Bristol; he went from Bristol. " * 3
        >>> entity_recall("A boy meets Silver.", "Silver leaves Bristol.", book)
        0.5
    """
    wanted = names_in(reference, book)
    return len(wanted & set(WORD.findall(written))) / len(wanted) if wanted else None


def copy_rate(written: str, book: str) -> float | None:
    """Share of the runs of five words of a summary that stand in the book too, in small letters and without punctuation; None below five words.

    Example:
        >>> copy_rate("Call me Ishmael! Some years passed", "Call me Ishmael. Some years ago, never mind how long")
        0.5
    """
    words, there = _words(written).split(), _words(book)
    runs = [" ".join(words[i : i + COPIED]) for i in range(len(words) - COPIED + 1)]
    return sum(f" {run} " in there for run in runs) / len(runs) if runs else None


def lead(book: str, words: int) -> str:
    """The first whole sentences of a book, up to so many words; at least one sentence.

    Example:
        >>> lead("It rained. The sea was calm that day, and we slept. We woke.", 9)
        'It rained.'
    """
    stop = 0
    for start, end in sentences(book):
        if stop and len(book[:end].split()) > words:
            break
        stop = end if book[start:end].strip() else stop
    return book[:stop].strip()


def first_words(text: str, count: int) -> str:
    """The text up to the end of word ``count``.

    >>> first_words("one  two three", 2)
    'one  two'
    """
    found = re.match(rf"\s*(?:\S+\s+){{0,{max(0, count - 1)}}}\S*", text)
    return found[0] if found else ""


@lru_cache(maxsize=32)  # a book is asked about many times
def _words(text: str) -> str:
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "
