"""A training row of passkey text, written token by token from left to right."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from infini.tasks.passkey.needles import Decoy, Quiz
from infini.tasks.rows import run_of

from infini.data.tokenizer import Tokenizer


class Asked(NamedTuple):
    """A question with its answer.

    Attributes:
        ids: tokens of both.
        number: how many of them, the last, are the number.
    """

    ids: np.ndarray
    number: int


class Script:
    """What is said in a row beside the filler, as token ids, cut as the benchmark cuts it.

    The number is encoded apart from the space before it, so that its tokens are the same wherever it stands.

    Args:
        tokenizer: of the rows.

    Example:
        >>> from infini.data.tokenizer import ByteTokenizer
        >>> bytes(Script(ByteTokenizer()).answer(12345))
        b' 12345'
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.after = self.ids(".\n")  # an answered question ends like every other sentence

    def ids(self, text: str) -> np.ndarray:
        """The token ids of a text."""
        return self._tokenizer.encode_bytes(text.encode())

    def head(self, quiz: Quiz) -> np.ndarray:
        """What a row begins with."""
        return self.ids(f"{quiz.task}\n")

    def statement(self, text: str) -> np.ndarray:
        """A statement between two stretches of filler."""
        return self.ids(f"\n{text}\n")

    def question(self, quiz: Quiz) -> np.ndarray:
        """What ends a prompt; its answer follows."""
        return self.ids(f"\n{quiz.question}")

    def number(self, key: int) -> np.ndarray:
        """The number alone."""
        return self.ids(str(key))

    def answer(self, key: int) -> np.ndarray:
        """A space and the number."""
        return np.concatenate([self.ids(" "), self.number(key)])

    def asked(self, question: str, key: int) -> Asked:
        """A question and its answer."""
        return Asked(np.concatenate([self.ids(f"\n{question}"), self.answer(key)]), len(self.number(key)))

    def asked_size(self, quiz: Quiz, key: int) -> int:
        """Tokens that an answered question takes amid filler."""
        return len(self.asked(quiz.question, key).ids) + len(self.after)

    def decoys(self, quiz: Quiz, share: float, after: bool) -> Iterator[tuple[Decoy, np.ndarray]]:
        """The decoys before, or after, a border at ``share`` of the row, and their statements."""
        for decoy in quiz.decoys:
            if (not decoy.before and decoy.place >= share) == after:
                yield decoy, self.statement(decoy.text)

    def sizes_around(self, quiz: Quiz, share: float) -> tuple[int, int]:
        """Tokens that are not filler before and after the border, without the answer."""
        before, after = (sum(len(ids) for _, ids in self.decoys(quiz, share, after)) for after in (False, True))
        before += len(self.head(quiz)) + len(self.statement(quiz.needle))
        return before, after + len(self.question(quiz))

    def fixed_size(self, quiz: Quiz) -> int:
        """Tokens of a prompt that are not filler."""
        return sum(self.sizes_around(quiz, 1.0))


class Row:
    """A row being written; the filler goes on where it was interrupted.

    Args:
        tokens: ids ``[length]``; overwritten.
        answer: bool ``[length]``; set where an answer's digits are, and the stop after them.
        after: ids that end an answered question.
        filler: ids ``[period]``.
        phase: where in it the row's filler begins.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        answer: np.ndarray,
        after: np.ndarray,
        filler: np.ndarray,
        phase: int,
    ):
        self.tokens, self.answer, self.filler, self.phase, self.at = tokens, answer, filler, phase, 0
        self._after = after

    def say(self, ids: np.ndarray) -> None:
        """Writes token ids; the row's end may cut them."""
        ids = ids[: len(self.tokens) - self.at]
        self.tokens[self.at : self.at + len(ids)] = ids
        self.at += len(ids)

    def fill(self, count: int) -> None:
        """Writes ``count`` tokens of filler."""
        self.tokens[self.at : self.at + count] = run_of(self.filler, self.phase, count)
        self.phase += count
        self.at += count

    def ask(self, asked: Asked) -> None:
        """Writes a question and its answer; that the number ends belongs to it."""
        self.say(asked.ids)
        start = self.at - asked.number
        self.say(self._after)
        self.answer[start : start + asked.number + 1] = True

    def stretch(self, filler: int, events: list[tuple[int, np.ndarray | Asked]]) -> None:
        """Writes ``filler`` tokens of filler, interrupted by events.

        Args:
            filler: tokens.
            events: how much of the filler comes before, and a statement or a question. Those with equal places keep
                their order.
        """
        done = 0
        for place, event in sorted(events, key=itemgetter(0)):
            self.fill(place - done)
            self.ask(event) if isinstance(event, Asked) else self.say(event)
            done = place
        self.fill(filler - done)
