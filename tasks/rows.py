"""Training batches by random access: rows of text, written byte by byte, under a segment curriculum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from infini.data.batch import Batch
from infini.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RowSource(ABC):
    """A map-style dataset of byte batches; ``source[step]`` depends on ``seed`` and ``step`` alone.

    So the data position of a training run is its step, and a resumed run sees the very batches that
    an uninterrupted one would have seen, whatever the number of workers.

    Curriculum: the rows of a batch have a random number of segments, uniform in
    ``min_segments..top``; ``top`` grows linearly to ``max_segments`` over the first ``growth`` of
    training. The number of rows keeps the batch near ``tokens_per_batch``.

    Attributes:
        steps: number of batches.
        seed: not negative.
        segment_length: bytes per segment, ``n``.
        min_segments: fewest segments of a row.
        max_segments: most segments of a row.
        growth: share of training after which rows of ``max_segments`` may come.
        tokens_per_batch: upper limit of ``rows * segments * n`` where one row fits.
    """

    steps: int
    seed: int = 0
    segment_length: int = 256
    min_segments: int = 2
    max_segments: int = 96
    growth: float = 0.5
    tokens_per_batch: int = 32768

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
        if not 0 <= self.growth <= 1:
            raise InputError(f"growth is {self.growth}; it is a share, from 0 to 1")

    @abstractmethod
    def write_row(
        self, random: np.random.Generator, progress: float, tokens: np.ndarray, answer: np.ndarray
    ) -> None:
        """Writes one row.

        Args:
            random: source of randomness.
            progress: 0..1, how far training has come.
            tokens: uint8 ``[S * n + 1]``, uninitialized; every byte is to be written.
            answer: bool ``[S * n + 1]``, all False; set where a byte belongs to an answer.
        """

    def top(self, step: int) -> int:
        """Most segments that a row of this step can have."""
        grown = 1.0 if self.growth == 0 else min(1.0, step / (self.growth * self.steps))
        return self.min_segments + int(grown * (self.max_segments - self.min_segments))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        random = np.random.default_rng((self.seed, step))
        segments = int(random.integers(self.min_segments, self.top(step), endpoint=True))
        length = segments * self.segment_length
        rows = max(1, self.tokens_per_batch // length)
        tokens = np.empty((rows, length + 1), np.uint8)
        answer = np.zeros((rows, length + 1), bool)
        for row in range(rows):
            self.write_row(random, step / self.steps, tokens[row], answer[row])
        return Batch(torch.from_numpy(tokens), torch.from_numpy(answer), segments)
