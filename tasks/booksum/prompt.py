"""What stands behind a book: the words that ask, and what is to be said."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from infini.data.tokenizer import Tokenizer

SUMMARY_PROMPT = "\n\n### Summary of the book\n\n"
END = "\n###"  # ends a summary; no book of ours has a line that begins so
ANSWER_END = "\n"
BLANK = "____"
_GAP = "_"  # the blank in what a model reads, where each sign is a token
_LAST_WORDS = re.compile(r"(?: \S+){0,8} ?$|\S+ ?$")  # eight at most, with the blank before each


class Asked(NamedTuple):
    """Token ids of a prompt and of its target. They are encoded apart, so that no token lies across the border."""

    prompt: np.ndarray
    target: np.ndarray


def ask_summary(tokenizer: Tokenizer, summary: str, most: int | None = None) -> Asked:
    """The prompt of a summary and the summary with its end; without the end where it is cut to ``most`` tokens.

    Example:
        >>> from infini.data.tokenizer import ByteTokenizer
        >>> prompt, target = ask_summary(ByteTokenizer(), "A whale.")
        >>> bytes(target), bytes(ask_summary(ByteTokenizer(), "A whale.", most=4).target)
        (b'A whale.\\n###', b'A wh')
    """
    target = tokenizer.encode_bytes((summary + END).encode())
    return Asked(tokenizer.encode_bytes(SUMMARY_PROMPT.encode()), target if most is None else target[:most])


def ask_blank(tokenizer: Tokenizer, passage: str, answer: str) -> Asked:
    """A passage with a blank, then once more its last words before the blank; and what is missing, with its end.

    The words said again stand before the answer as they stood before it in the book. So the memory is asked by what it was written
    with, as in any text that repeats, when what stands behind the blank is known too.

    Args:
        tokenizer: the model's.
        passage: with one ``____``.
        answer: for the blank.

    Example:
        >>> from infini.data.tokenizer import ByteTokenizer
        >>> prompt, target = ask_blank(ByteTokenizer(), "Then ____ went home.", "Ann")
        >>> bytes(prompt), bytes(target)
        (b'\\n\\n? Then _ went home.\\n= Then', b' Ann\\n')
    """
    before, _, behind = passage.partition(BLANK)
    again = _LAST_WORDS.search(" " + before)[0]
    said = again.rstrip(" ")
    prompt, target = f"\n\n? {before}{_GAP}{behind}\n={said}", f"{again[len(said):]}{answer}{ANSWER_END}"
    return Asked(tokenizer.encode_bytes(prompt.encode()), tokenizer.encode_bytes(target.encode()))


def ask_recital(tokenizer: Tokenizer, begun: str, rest: str) -> Asked:
    """The first words of a sentence, and the others, with their end.

    Example:
        >>> from infini.data.tokenizer import ByteTokenizer
        >>> prompt, target = ask_recital(ByteTokenizer(), "Call me", " Ishmael.")
        >>> bytes(prompt), bytes(target)
        (b'\\n\\n> Call me', b' Ishmael.\\n')
    """
    return Asked(tokenizer.encode_bytes(f"\n\n> {begun}".encode()), tokenizer.encode_bytes(f"{rest}{ANSWER_END}".encode()))
