"""A training row of passkey text, written byte by byte from left to right."""

from __future__ import annotations

from operator import itemgetter

import numpy as np
from infini.tasks.passkey.needles import Quiz
from infini.tasks.rows import run_of

_AFTER = b".\n"  # an answered question ends like every other sentence


class Row:
    """A row being written; the filler goes on where it was interrupted.

    Args:
        tokens: uint8 ``[length]``; overwritten.
        answer: bool ``[length]``; set where an answer's digits are, and the stop after them.
        quiz: what is said and asked.
        key: the number that is asked for.
        filler: uint8 ``[period]``.
        phase: where in it the row's filler begins.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        answer: np.ndarray,
        quiz: Quiz,
        key: int,
        filler: np.ndarray,
        phase: int,
    ):
        self.tokens, self.answer, self.filler, self.phase, self.at = tokens, answer, filler, phase, 0
        self._question, self._key = f"\n{quiz.question} ".encode(), b"%d" % key

    def text(self, text: bytes) -> None:
        """Writes a text; the row's end may cut it."""
        text = text[: len(self.tokens) - self.at]
        self.tokens[self.at : self.at + len(text)] = np.frombuffer(text, np.uint8)
        self.at += len(text)

    def fill(self, count: int) -> None:
        """Writes ``count`` bytes of filler."""
        self.tokens[self.at : self.at + count] = run_of(self.filler, self.phase, count)
        self.phase += count
        self.at += count

    def ask(self) -> None:
        """Writes the question and its answer; that the number ends belongs to it."""
        self.text(self._question + self._key)
        start = self.at - len(self._key)
        self.text(_AFTER)
        self.answer[start : start + len(self._key) + 1] = True

    def stretch(self, filler: int, events: list[tuple[int, bytes | None]]) -> None:
        """Writes ``filler`` bytes of filler, interrupted by events.

        Args:
            filler: bytes.
            events: how much of the filler comes before, and a statement (None: the question). Those with
                equal places keep their order.
        """
        done = 0
        for place, statement in sorted(events, key=itemgetter(0)):
            self.fill(place - done)
            self.ask() if statement is None else self.text(statement)
            done = place
        self.fill(filler - done)


def head_of(quiz: Quiz) -> bytes:
    """What a row begins with."""
    return f"{quiz.task}\n".encode()


def statement_of(text: str) -> bytes:
    """A statement between two stretches of filler."""
    return f"\n{text}\n".encode()


def question_size(quiz: Quiz) -> int:
    """Bytes of the question; its answer follows."""
    return len(f"\n{quiz.question}".encode())


def answer_size(key: int) -> int:
    """Bytes of an answer: a space and the digits."""
    return len(f" {key}")


def asked_size(quiz: Quiz, key: int) -> int:
    """Bytes that an answered question takes amid filler."""
    return question_size(quiz) + answer_size(key) + len(_AFTER)
