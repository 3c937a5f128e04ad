"""Language modeling on whole documents: rows that read on from batch to batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from infini.tasks.perplexity.held_out import HeldOutText

from infini.data.batch import Batch
from infini.data.tokenized import tokenize
from infini.data.tokenizer import open_tokenizer
from infini.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DocumentStream:
    """A map-style dataset of token batches, each going on where the one of the same stream before it ended.

    The documents, in an order drawn for each epoch, make one text; it is cut into ``streams * rows * world_size`` lanes of
    equal length, and row after row reads its lane in windows of ``segments`` segments. So a document is read from its first to
    its last token, by one row, over as many steps as it takes; only one that a lane's border cuts is read by two. Each
    token of an epoch is predicted once, but for the first ones of documents and of lanes, and the last of the order, too few
    for a token in every lane, which are left out.

    ``source[step]`` depends on ``seed`` and ``step`` alone: a resumed run sees what an uninterrupted one would have seen.

    Attributes:
        steps: number of batches.
        texts: files, see :func:`infini.data.documents.read_documents`; all are encoded when the source is made, or opened
            where they were before, see :func:`infini.data.tokenized.tokenize`.
        tokenizer: the model's, ``"bytes"`` or a ``tokenizer.json``.
        column: of tables.
        validation_texts: files of documents that are held out, read in training every ``validate_every`` steps, whole; none of them may be
            among ``texts``.
        seed: not negative; of the order of documents.
        segment_length: tokens per segment, ``n``.
        segments: segments of a row, which gradients go through; state goes on without gradient.
        rows: rows of a batch.
        streams: batches that take turns, ``source[step]`` being of stream ``step % streams``. As many as batches make a step
            of the optimizer give it different texts.
        shortest: documents of fewer tokens are left out. A memory is of no use in one that fits a segment.
        rank: which of ``world_size`` processes this is. Each has lanes of its own, ``rows`` a batch; their batches together are
            the batch of one process with ``rows * world_size`` rows.
        world_size: processes.

    Example:
        >>> source = DocumentStream(steps=9, texts=(__file__,), segment_length=16, segments=2, rows=3)
        >>> first, second = source[0], source[1]
        >>> torch.equal(first.tokens[:, -1], second.tokens[:, 0])  # read last there, read on from here
        True
    """

    steps: int
    texts: tuple[str, ...]
    seed: int = 0
    segment_length: int = 256
    segments: int = 32
    rows: int = 4
    streams: int = 1
    shortest: int = 0
    tokenizer: str = "bytes"
    column: str = "text"
    validation_texts: tuple[str, ...] = ()
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        for name in ("steps", "segment_length", "segments", "rows", "streams", "world_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("seed", "shortest"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"rank is {self.rank} of {self.world_size} processes; it must be 0 to {self.world_size - 1}")
        tokenizer = open_tokenizer(self.tokenizer)
        text = tokenize(self.texts, tokenizer, self.column)
        kept = np.flatnonzero(text.sizes >= max(1, self.shortest))
        sizes, lanes = text.sizes[kept], self.rows * self.streams * self.world_size
        if sizes.sum() < 2 * lanes:
            raise InputError(
                f"{len(kept)} of {len(text)} documents have {self.shortest} tokens or more, {sizes.sum()} tokens in all, "
                f"for {lanes} lanes (rows * streams * world_size) of at least 2; give more text or lower shortest"
            )
        if sizes.max() <= self.segment_length:
            raise InputError(
                f"the longest document has {sizes.max()} tokens and a segment {self.segment_length}: nothing would ever be carried over a border; "
                "give longer documents or a smaller model.segment_length"
            )
        object.__setattr__(self, "_text", text)
        object.__setattr__(self, "_kept", kept)
        object.__setattr__(self, "_tokenizer_sha256", tokenizer.fingerprint)
        object.__setattr__(self, "_sizes", sizes)
        object.__setattr__(self, "_begins", (text.sizes.cumsum() - text.sizes)[kept])
        object.__setattr__(self, "_length", int(sizes.sum()) // lanes)
        object.__setattr__(self, "_orders", {})
        held_out = None
        if self.validation_texts:
            held_out = HeldOutText(tokenize(self.validation_texts, tokenizer, self.column), self.rows, self.segments * self.segment_length)
            held_out.require_apart(text)
        object.__setattr__(self, "held_out", held_out)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the documents that are read, as tokens and in the order of their files, of those held out, and of the tokenizer."""
        tokenizer = {} if self._tokenizer_sha256 is None else {"tokenizer_sha256": self._tokenizer_sha256}
        held_out = {} if self.held_out is None else {"validation_texts_sha256": self.held_out.text.digest()}
        return {"texts_sha256": self._text.digest(self._kept)} | held_out | tokenizer

    def epochs(self, batches: int) -> float:
        """How often each document has been read after so many batches."""
        return batches / self.streams * self.segments * self.segment_length / self._length

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        turn, stream = divmod(step, self.streams)
        length = self.segments * self.segment_length
        tokens = np.empty((self.rows, length + 1), self._text.tokens.dtype)
        reset = np.zeros(tokens.shape, bool)
        for row in range(self.rows):
            lane = (stream * self.world_size + self.rank) * self.rows + row
            self._read(lane, turn * length, tokens[row], reset[row])
        return Batch(
            torch.from_numpy(tokens),
            torch.zeros(tokens.shape, dtype=torch.bool),
            self.segments,
            stream=stream,
            reset=torch.from_numpy(reset),
        )

    def _read(self, lane: int, start: int, tokens: np.ndarray, reset: np.ndarray) -> None:
        """Fill a window with what the lane holds from token ``start`` of all its epochs on."""
        length, done = self._length, 0
        while done < len(tokens):
            epoch, place = divmod(start + done, length)
            count = min(len(tokens) - done, length - place)
            self._read_epoch(epoch, lane * length + place, tokens[done : done + count], reset[done : done + count])
            # What stands before a lane was read by another row.
            reset[done] |= place == 0
            done += count

    def _read_epoch(self, epoch: int, start: int, tokens: np.ndarray, reset: np.ndarray) -> None:
        """Fill a window with an epoch's text from token ``start`` on."""
        order, ends = self._order(epoch)
        i, done = int(np.searchsorted(ends, start, side="right")), 0
        while done < len(tokens):
            document, left = order[i], int(ends[i]) - start - done
            inside, count = int(self._sizes[document]) - left, min(left, len(tokens) - done)
            begin = int(self._begins[document]) + inside
            tokens[done : done + count] = self._text.tokens[begin : begin + count]
            reset[done] = inside == 0
            i, done = i + 1, done + count

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in their order, and where in its text each of them ends."""
        if epoch not in self._orders:
            while len(self._orders) > 1:  # a window lies in two epochs at most, or in many short ones
                self._orders.pop(min(self._orders))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self._sizes))
            self._orders[epoch] = order, self._sizes[order].cumsum()
        return self._orders[epoch]
