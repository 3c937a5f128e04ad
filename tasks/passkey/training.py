"""Training batches for the passkey: passkey rows among rows of dense recall."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from infini.errors import InputError
from infini.tasks.passkey.keys import draw_keys
from infini.tasks.passkey.prompt import FILLER, NEEDLE, QUESTION, TASK
from infini.tasks.recall.training import RecallTraining
from infini.tasks.rows import RowSource

DIGITS = 5
_KEY = "0" * DIGITS
_HEAD = (TASK + "\n").encode()
_NEEDLE_SIZE = len("\n" + NEEDLE.format(key=_KEY) + "\n")
_QUESTION = ("\n" + QUESTION).encode()
_ANSWER_SIZE = 1 + DIGITS  # a space and the digits
_AFTER = b".\n"  # an answered question ends like every other sentence
_ASKED_SIZE = len(_QUESTION) + _ANSWER_SIZE + len(_AFTER)
SHORTEST_PROMPT = len(_HEAD) + _NEEDLE_SIZE + len(_QUESTION)


@dataclass(frozen=True, kw_only=True)
class PasskeyTraining(RowSource):
    """Rows of the passkey benchmark's own text, and rows of dense recall to learn retrieval from.

    The signal of one passkey in a long text is too thin to teach retrieval from scratch: the share
    of recall rows falls linearly from ``recall_share_start`` to ``recall_share_end`` over the first
    ``recall_fall`` of training, and ``dense_question_share`` of the passkey rows ask the question
    again every half to two segments after the needle.

    A passkey row is a benchmark prompt, its answer and a little more filler. The key's depth is
    uniform. The last prompt ends within the row's last segment; in ``border_share`` of the rows it
    ends exactly on a segment border, where the benchmark's round lengths put it (its answer is then
    written into a new segment). Keys of the benchmark never occur.

    Attributes:
        recall_share_start: share of recall rows at the first step.
        recall_share_end: share of recall rows from ``recall_fall`` on.
        recall_fall: share of training over which the one becomes the other.
        dense_question_share: share of passkey rows with the question repeated.
        near_share: share of passkey rows with less than a segment between needle and last question, where
            local attention has to copy the digits; a uniform depth hardly ever asks for that.
        border_share: share of passkey rows whose last prompt ends on a segment border.
        recall_pools: see :class:`RecallTraining`.
        recall_longest_gaps: see :class:`RecallTraining`.

    Example:
        >>> source = PasskeyTraining(steps=100, recall_share_start=0.0, recall_share_end=0.0)
        >>> batch = source[0]
        >>> text = bytes(batch.tokens[0].tolist()).decode()
        >>> start = text.index("The pass key is ") + 16
        >>> asked = bytes(batch.tokens[0][batch.answer[0]].tolist()).decode()
        >>> asked[-5:] == text[start : start + 5]
        True
    """

    recall_share_start: float = 1.0
    recall_share_end: float = 0.2
    recall_fall: float = 0.5
    dense_question_share: float = 0.5
    near_share: float = 0.1
    border_share: float = 0.25
    recall_pools: tuple[int, ...] = (1, 2, 4, 8, 16)
    recall_longest_gaps: tuple[int, ...] = (0, 32, 128, 512)

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "recall_share_start",
            "recall_share_end",
            "recall_fall",
            "dense_question_share",
            "near_share",
            "border_share",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")
        shortest = self.min_segments * self.segment_length
        if shortest + 1 < SHORTEST_PROMPT + _ANSWER_SIZE:
            raise InputError(
                f"min_segments {self.min_segments} of segment_length {self.segment_length} are "
                f"{shortest} bytes, but a passkey row takes {SHORTEST_PROMPT + _ANSWER_SIZE - 1}; "
                "raise min_segments"
            )
        # Built once: it checks its own settings, and write_row calls it for most rows.
        recall = RecallTraining(
            steps=self.steps, pools=self.recall_pools, longest_gaps=self.recall_longest_gaps
        )
        object.__setattr__(self, "_recall", recall)

    def recall_share(self, progress: float) -> float:
        """The share of recall rows when ``progress`` (0..1) of training is done."""
        fallen = 1.0 if self.recall_fall == 0 else min(1.0, progress / self.recall_fall)
        return self.recall_share_start + fallen * (self.recall_share_end - self.recall_share_start)

    def write_row(self, random, progress, tokens, answer) -> None:
        if random.random() < self.recall_share(progress):
            self._recall.write_row(random, progress, tokens, answer)
        else:
            self._write_passkey(random, tokens, answer)

    def _write_passkey(self, random, tokens, answer) -> None:
        key = b"%d" % draw_keys(random, 1, DIGITS, held_out=False)[0]
        prompt = self._prompt_length(random, len(tokens))
        filler = prompt - SHORTEST_PROMPT
        row = _Row(tokens, answer, phase=int(random.integers(_PERIOD)))

        before = int(random.integers(filler, endpoint=True))
        if random.random() < self.near_share:
            before = filler - int(random.integers(min(filler, self.segment_length), endpoint=True))
        row.text(_HEAD)
        row.filler(before)
        row.text(("\n" + NEEDLE.format(key=key.decode()) + "\n").encode())
        left = filler - before
        if random.random() < self.dense_question_share:
            half = self.segment_length // 2
            while (gap := int(random.integers(half, 4 * half, endpoint=True))) + _ASKED_SIZE < left:
                row.filler(gap)
                row.ask(key)
                left -= gap + _ASKED_SIZE
        row.filler(left)
        row.ask(key)
        row.filler(len(tokens) - row.at)

    def _prompt_length(self, random, row_length: int) -> int:
        """Where the last question ends: in the last segment, the answer's digits still inside."""
        border = row_length - 1 - self.segment_length
        if border >= SHORTEST_PROMPT and random.random() < self.border_share:
            return border
        shortest = max(border, SHORTEST_PROMPT)
        return int(random.integers(shortest, row_length - _ANSWER_SIZE, endpoint=True))


_PERIOD = len(FILLER)
_FILLER = np.frombuffer(FILLER.encode(), np.uint8)


class _Row:
    """A row being written from left to right; the filler goes on where it was interrupted."""

    def __init__(self, tokens: np.ndarray, answer: np.ndarray, phase: int):
        self.tokens, self.answer, self.phase, self.at = tokens, answer, phase, 0
        self._lap = np.tile(_FILLER, len(tokens) // _PERIOD + 2)

    def text(self, text: bytes) -> None:
        # The row's end may cut what follows the last answer.
        text = text[: len(self.tokens) - self.at]
        self.tokens[self.at : self.at + len(text)] = np.frombuffer(text, np.uint8)
        self.at += len(text)

    def filler(self, count: int) -> None:
        self.tokens[self.at : self.at + count] = self._lap[self.phase : self.phase + count]
        self.phase = (self.phase + count) % _PERIOD
        self.at += count

    def ask(self, key: bytes) -> None:
        self.text(_QUESTION + b" " + key)
        self.answer[self.at - DIGITS : self.at] = True
        self.text(_AFTER)
