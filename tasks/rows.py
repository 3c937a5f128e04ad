"""Training batches by random access: rows of written text under a segment curriculum."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from infini.tasks.numbers import sow_numbers
from infini.tasks.text_files import read_texts

from infini.data.batch import Batch
from infini.data.documents import Document
from infini.data.tokenized import tokenize_documents
from infini.data.tokenizer import open_tokenizer
from infini.errors import InputError


def run_of(text: np.ndarray, start: int, count: int) -> np.ndarray:
    """``count`` tokens of a text from ``start`` on, wrapping round at its end; may be a view.

    Example:
        >>> run_of(np.frombuffer(b"abcd", np.uint8), 7, 6).tobytes()
        b'dabcda'
    """
    start %= len(text)
    if start + count <= len(text):
        return text[start : start + count]
    # Not take(mode="wrap"), which goes round once a turn for every token.
    return np.resize(np.concatenate((text[start:], text[:start])), count)


@dataclass(frozen=True, kw_only=True)
class RowSource(ABC):
    """A map-style dataset of batches of tokens; ``source[step]`` depends on ``seed`` and ``step`` alone.

    So the data position of a training run is its step, and a resumed run sees the very batches that
    an uninterrupted one would have seen, whatever the number of workers.

    Curriculum: the rows of a batch have a random number of segments, uniform in
    ``min_segments..top``; ``top`` grows linearly to ``max_segments`` over the first ``growth`` of
    training. The number of rows keeps the batch near ``tokens_per_batch``.

    Attributes:
        steps: number of batches.
        seed: not negative.
        segment_length: tokens per segment, ``n``.
        min_segments: fewest segments of a row.
        max_segments: most segments of a row.
        growth: share of training after which rows of ``max_segments`` may come.
        tokens_per_batch: upper limit of ``rows * segments * n`` where one row fits.
        haystacks: files of natural text, see :func:`infini.tasks.text_files.read_texts`; all are read
            when the source is made, and encoded or opened where they were before (:mod:`infini.data.tokenized`).
        text_share: share of rows whose filler is a window of that text, begun at a random token.
        number_share: 0..0.5, share of its words that are numbers instead, in one half of these rows; see
            :func:`infini.tasks.numbers.sow_numbers`.
        tokenizer: the model's, ``"bytes"`` or a ``tokenizer.json``.
    """

    steps: int
    seed: int = 0
    segment_length: int = 256
    min_segments: int = 2
    max_segments: int = 96
    growth: float = 0.5
    tokens_per_batch: int = 32768
    haystacks: tuple[str, ...] = ()
    text_share: float = 0.0
    number_share: float = 0.0
    tokenizer: str = "bytes"

    def __post_init__(self):
        for name in ("steps", "segment_length", "min_segments", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_segments < self.min_segments:
            raise InputError(
                f"max_segments is {self.max_segments}, less than min_segments {self.min_segments}; "
                "raise it"
            )
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must not be negative")
        for name in ("growth", "text_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")
        if (self.text_share > 0) != bool(self.haystacks):
            raise InputError(
                f"text_share is {self.text_share} and haystacks are {list(self.haystacks)}; "
                "give both, or 0 and none"
            )
        if not 0 <= self.number_share <= 0.5 or (self.number_share and not self.haystacks):
            raise InputError(
                f"number_share is {self.number_share} and haystacks are {list(self.haystacks)}; "
                "it is a share of the words of haystacks, from 0 to 0.5"
            )
        object.__setattr__(self, "_tokenizer", open_tokenizer(self.tokenizer))
        text, sown = "\n\n".join(map(read_texts, self.haystacks)), None
        if self.number_share:
            sown = sow_numbers(np.frombuffer(text.encode(), np.uint8), self.number_share, self.seed).tobytes().decode()
        object.__setattr__(self, "_text", self._encoded(text))
        object.__setattr__(self, "_sown", None if sown is None else self._encoded(sown))

    def _encoded(self, text: str) -> np.ndarray:
        return tokenize_documents([Document("haystack", text)] if text else [], self._tokenizer).tokens

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the natural text, as tokens, where there is any, and of the tokenizer."""
        tokenizer = {} if self._tokenizer.fingerprint is None else {"tokenizer_sha256": self._tokenizer.fingerprint}
        return ({"haystacks_sha256": hashlib.sha256(self._text).hexdigest()} if self.haystacks else {}) | tokenizer

    @abstractmethod
    def write_row(
        self, random: np.random.Generator, progress: float, tokens: np.ndarray, answer: np.ndarray
    ) -> None:
        """Writes one row.

        Args:
            random: source of randomness.
            progress: 0..1, how far training has come.
            tokens: ids ``[S * n + 1]``, uninitialized; every one is to be written.
            answer: bool ``[S * n + 1]``, all False; set where a token belongs to an answer.
        """

    def draw_filler(self, random: np.random.Generator, own: np.ndarray) -> np.ndarray:
        """The text that fills a row: natural text in ``text_share`` of the rows, else ``own``."""
        # Without natural text nothing is drawn, so that rows are what they were before there was any.
        if not self.text_share or random.random() >= self.text_share:
            return own
        return self._text if self._sown is None or random.random() < 0.5 else self._sown

    def top(self, step: int) -> int:
        """Most segments that a row of this step can have."""
        grown = 1.0 if self.growth == 0 else min(1.0, step / (self.growth * self.steps))
        return self.min_segments + int(grown * (self.max_segments - self.min_segments))

    def random(self, step: int, *stream: int) -> np.random.Generator:
        """The source of randomness of a step, or another one that has nothing to do with it.

        Raises:
            IndexError: no such step; iteration over the source ends with it.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        return np.random.default_rng((self.seed, step, *stream))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        random = self.random(step)
        segments = int(random.integers(self.min_segments, self.top(step), endpoint=True))
        length = segments * self.segment_length
        rows = max(1, self.tokens_per_batch // length)
        tokens = np.empty((rows, length + 1), self._tokenizer.dtype)
        answer = np.zeros((rows, length + 1), bool)
        for row in range(rows):
            self.write_row(random, step / self.steps, tokens[row], answer[row])
        return Batch(torch.from_numpy(tokens), torch.from_numpy(answer), segments)
